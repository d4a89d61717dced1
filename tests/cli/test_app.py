"""The command line before any command runs: quoting, typos, one-line errors."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from prts.cli.app import COMMANDS, config_dir, run
from prts.cli.check import check_config
from prts.cli.exit_status import in_config_terms, verdict
from prts.cli.main import main
from prts.cli.overrides import quote_paths
from prts.errors import ParameterError

TISSUES = ("demo", "her2st", "brain", "lung", "breast", "colon", "xenium_breast")
ABLATIONS = ("full", "local_only", "global_only")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda s: s not in ("null", "???")))
def test_a_path_reaches_the_command_letter_for_letter(path):
    if path[0] in "'\"" or "${" in path:
        return  # quoted by the user already, or an interpolation: Hydra's own rules
    (argument,) = quote_paths([f"image={path}"])
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert override.value() == path


def test_only_paths_are_quoted():
    assert quote_paths(["seed=1,2", "tissue=lung", "out=a,b"]) == ["seed=1,2", "tissue=lung", "out='a,b'"]


def test_a_grid_over_paths_stays_a_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quote_paths(["-m", "encoder.weights=a.pth,b.pth"]) == ["-m", "encoder.weights=a.pth,b.pth"]
    Path("a.pth,b.pth").touch()
    assert quote_paths(["-m", "encoder.weights=a.pth,b.pth"]) == ["-m", "encoder.weights='a.pth,b.pth'"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tissue=lnug"], ["tissue=lnug", "did you mean 'lung'"]),
        (["tisue=lung"], ["tisue", "did you mean 'tissue'"]),
        (["trainer.max_epoch=3"], ["trainer.max_epoch", "did you mean 'trainer.max_epochs'"]),
        (["max_epochs=3"], ["max_epochs", "did you mean 'trainer.max_epochs'"]),
        (["trainer.max_epochs=many"], ["trainer.max_epochs: 'many'", "a whole number"]),
        (["tissue=demo,lnug", "-m"], ["tissue=lnug", "did you mean 'lung'"]),
        (["seed=[1"], ["seed=[1", "not a valid override"]),
        (["--epochs"], ["--epochs", "no such flag"]),
        (["--experimental-rerun=x.pickle"], ["no such flag"]),
        (["tissue.sections.train.imagee=x"], ["tissue.sections.train.imagee"]),
    ],
)
def test_a_mistyped_argument_is_one_line_and_exit_2(arguments, words, capsys):
    assert run("train", arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("predict", "mpp=half", "mpp: 'half' is not accepted; give a number from 0.05 to 5, or null"),
        ("predict", "mpp=[0.5]", "mpp: [0.5]"),
        ("predict", "mpp=-1", "mpp: -1"),
        ("predict", "intervals=maybe", "intervals: 'maybe' is not accepted; give true or false, or null"),
        ("predict", "rotate=45", "rotate: 45 is not accepted; give 0, 90, 180 or 270"),
        ("predict", "flip=yes", "flip: 'yes'"),
        ("predict", "roi=5", "roi: '5'"),
        ("predict", "max_pixels=-1", "max_pixels: -1"),
        ("predict", "bundle=null", "bundle: null"),
        ("train", "qc.max_area_px=lots", "qc.max_area_px: 'lots'"),
        (
            "train",
            "model.net.hidden=5",
            "model.net.hidden: 5 is not accepted; give a list, each a whole number from 1 to 65536",
        ),
        ("train", "model.optimizer.lr=-1", "model.optimizer.lr: -1 is not accepted; give a number above 0"),
        ("train", "+model.optimizer.betas=[5,5]", "model.optimizer: Invalid beta parameter"),
        ("train", "trainer.max_epochs=0", "trainer.max_epochs: 0"),
        ("train", "seed=x", "seed: 'x'"),
        ("train", "seed=-1", "seed: -1"),
        ("train", "data.batch_size=0", "data.batch_size: 0"),
        ("train", "data.use=[]", "data.use: []"),
        ("train", "evaluation.bootstrap=-5", "evaluation.bootstrap: -5"),
        ("train", "encoder.batch_size=0", "encoder.batch_size: 0"),
        ("train", "segmentation.floor=lots", "segmentation.floor: 'lots'"),
        ("train", "tissue=[]", "tissue.name: is required"),
        ("train", "tissue=5", "tissue=5: is not the name of a choice"),
        ("train", "hydra.run.dir=null", "hydra.run.dir=null"),
        ("train", "seed=1,2", "seed=1,2: contains commas"),
        ("train", "+nonsense=1", "nonsense: no such key"),
        ("train", "~seed", "seed: is required"),
        ("train", "tissue.name=${nothing}", "tissue.name: "),
        ("simulate", "cells=none", "cells: 'none' is not accepted; give a whole number from 50 to 10000000"),
        ("simulate", "cells=-5", "cells: -5"),
        ("download", "paths.data_dir=x", "tissue: is required; choose one with tissue=NAME"),
    ],
)
def test_a_wrong_value_is_refused_before_any_work(command, override, words):
    required = {"predict": ["bundle=b", "image=i", "out=o"], "simulate": ["out=o"]}.get(command, [])
    with pytest.raises(Exception) as caught:  # OmegaConf's for interpolations
        check_config(command, [*required, override])
    status, line = verdict(caught.value)
    assert (status, line[: len(words)]) == (2, words)
    assert "\n" not in line


def test_values_in_files_are_checked_as_those_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tissue = Path("configs/tissue/mine.yaml")
    tissue.parent.mkdir(parents=True)
    section = "{image: a.tif, bins: b, mpp: half}"
    tissue.write_text(f"name: mine\nspecies: human\nsections: {{s: {section}}}\ntrain: [s]\n")
    # ./configs is found without being named
    assert run("train", ["tissue=mine", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert "prts: tissue.sections.s.mpp: 'half' is not accepted" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    tissue.write_text(tissue.read_text().replace("half", "0.5").replace("train:", "trian:"))
    assert run("train", ["tissue=mine", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert "tissue/mine.yaml: tissue.trian: no such key, did you mean 'tissue.train'?" in capsys.readouterr().err


def test_a_folder_of_configs_without_groups_explains_itself(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    assert run("train", ["tissue=mine", "--config-dir", str(tmp_path)]) == 2
    assert f"belongs in {tmp_path / 'tissue' / 'mine.yaml'}" in capsys.readouterr().err


def test_printing_a_config_imports_neither_torch_nor_pandas():
    code = "import sys; from prts.cli.main import main; main(['train', '--cfg', 'job']); print({'torch', 'pandas'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "set()"


def test_errors_of_the_library_are_named_by_their_key():
    for owner, key in {
        "segmenter": "segmentation",
        "likelihood": "loss",
        "network": "model.net",
        "encoder": "encoder",
    }.items():
        assert in_config_terms(ParameterError(owner, "x", "is wrong")) == f"{key}.x: is wrong"
    assert in_config_terms(ParameterError("", "mpp", "is wrong")) == "mpp: is wrong"
    assert in_config_terms(ParameterError("encoder", "", "is wrong")) == "encoder: is wrong"


def test_a_required_key_is_named(capsys):
    assert run("predict", ["image=x.tif", "out=y.h5ad"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "bundle: is required" in error


def test_an_unknown_command_is_named(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_help_lists_every_command_and_each_has_an_example(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command} " in overview
        assert main([command, "--help"]) == 0
        assert f"example: prts {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys; from prts.cli.main import main; main(['--help']); print(sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'torch'", "'hydra'", "'anndata'", "'tensorflow'", "'numpy'"):
        assert heavy not in out


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("tissue", TISSUES)
def test_every_tissue_and_ablation_composes(tissue, ablation):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", [f"tissue={tissue}", f"ablation={ablation}"])
    assert cfg.tissue.name == tissue
    blocks = {"full": ["local", "global", "morphology"], "local_only": ["local"], "global_only": ["global"]}
    assert list(cfg.data.use) == blocks[ablation]
    assert set(cfg.tissue.train) <= set(cfg.tissue.sections)
    OmegaConf.to_container(cfg.tissue, resolve=True)


def test_a_choice_on_the_command_line_wins_over_the_tissue():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert compose("train", ["tissue=demo"]).segmentation.name == "watershed"
        assert compose("train", ["tissue=demo", "segmentation=stardist"]).segmentation.name == "stardist"


def test_missing_data_names_the_download(tmp_path, capsys):
    outcome = run(
        "train", ["tissue=lung", f"paths.data_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}", "encoder=classical"]
    )
    assert outcome == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "prts download tissue=lung" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [[], ["train.log"], ["notes.txt"]])
def test_a_refused_run_leaves_its_users_folder_as_it_was(tmp_path, kept):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in kept:
        (folder / name).write_text("mine")
    where = [f"paths.data_dir={tmp_path}", f"hydra.run.dir={folder}", "encoder=classical"]
    assert run("train", ["tissue=lung", *where]) == 2
    if kept != ["train.log"]:  # to which the run's own lines are added
        assert [path.name for path in folder.iterdir() if path.name not in (".hydra", "train.log")] == kept
    assert folder.is_dir() and all((folder / name).read_text().startswith("mine") for name in kept)


def test_a_tissue_of_ones_own_lies_anywhere(tmp_path, capsys):
    (tmp_path / "my configs" / "tissue").mkdir(parents=True)
    config = "name: mine\nspecies: human\nsections: {s1: {image: nowhere.tif, bins: nowhere}}\ntrain: [s1]\nval: []\ntest: []\n"
    (tmp_path / "my configs" / "tissue" / "mine.yaml").write_text(config)
    where = ["--config-dir", str(tmp_path / "my configs"), f"hydra.run.dir={tmp_path / 'run'}"]
    assert run("train", ["tissue=mine", "encoder=classical", "split=blocks", *where]) == 2
    assert "nowhere.tif: no such file" in capsys.readouterr().err
    assert run("train", ["tissue=mien", *where]) == 2
    assert "did you mean 'mine'" in capsys.readouterr().err
    assert run("train", ["tissue=mine", "--config-dir", "nowhere"]) == 2
    assert "--config-dir nowhere: no such folder" in capsys.readouterr().err


def test_no_log_handler_outlives_its_command(tmp_path):
    before = logging.getLogger().handlers[:]
    assert run("train", ["tissue=lung", f"paths.data_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert logging.getLogger().handlers == before


def test_a_refused_run_leaves_no_empty_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    assert run("train", ["trainer.max_epochs=0"]) == 2
    assert "trainer.max_epochs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["outputs"]
