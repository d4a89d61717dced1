"""Every key of every command refuses values of the wrong kind in one line that names it, unless the value is meant."""

import copy
import re
from functools import cache

import pytest

from prts.cli.app import COMMANDS
from prts.cli.check import check_values
from prts.cli.config import compose, plain
from prts.cli.exit_status import in_config_terms
from prts.cli.schema import SCHEMAS
from prts.errors import InputError

REQUIRED = {
    "simulate": ["out=o"],
    "predict": ["bundle=b", "image=i", "out=o"],
    "evaluate": ["prediction=p", "section=s", "out=o"],
    "analyze": ["prediction=p", "out=o"],
    "export": ["prediction=p", "format=csv", "out=o"],
    "push": ["bundle=b", "repo=o/n"],
    "bench": ["section=s"],
    "download": ["tissue=lung"],
}
CHOICES = [
    *((command, ()) for command in SCHEMAS if command != "prepare"),  # whose keys are those of train
    ("train", ("tissue=lung", "experiment=paper")),
    ("train", ("tissue=kidney", "experiment=bins")),
    ("train", ("split=random", "experiment=released", "logger=many")),
    ("train", ("loss=hurdle", "trainer=ddp", "segmentation=stardist", "logger=mlflow")),
    ("train", ("encoder=timm", "panel=file", "debug=default", "segmentation=polygons")),
    ("predict", ("segmentation=stardist",)),
    ("evaluate", ("qc=paper",)),
]
WRONG = {
    "text": "lots",
    "null": None,
    "negative": -7,
    "flag": True,
    "huge": 10**40,
    "infinite": float("inf"),
    "empty": [],
    "mapping": {"a": 1},
}
# What is meant, by key: any text can be a path or name, null a default, and some numbers have no limit that is known before the work.
MEANT = {
    "text": r"(.*\.)?(analysis|annotations|artifact_location|bins|bundle|cache_dir|checkpoint_key|classification|data_dir|experiment_name"
    r"|gmt|image|markers|model|model_name|monitor|name|nuclei|obo|orthologs|out|path|prediction|project|roi|run|run_name|save_dir|second"
    r"|cite|license|message|revision|layout|section|slides|species|mt_prefix|spots|stain|tracking_uri|train_nuclei|train_section|version|visium|weights|folder|genes"
    r"|data\.target|trainer\.(accelerator|strategy|devices|precision)|encoder\.(adapter|device|pooling))",
    "null": r"(.*\.)?(analysis|annotations|artifact_location|batch_size|broad|bundle|checkpoint_key|classification|download|experiment_name"
    r"|cite|datasets|license|message|revision|genes|image|intervals|local_width|logger|markers|max_area_px|max_area_um2|max_pct_mt|max_pixels|mt_prefix|mean|std|min_cells|min_umi|model_mpp|mpp|name"
    r"|nms_thresh|nuclei|obo|orthologs|out|page|path|patterns|prediction|prob_thresh|qc|region|roi|run|run_name|save_dir|second|section"
    r"|segmentation|slides|slides_per_job|spots|test|tracking_uri|train_nuclei|train_section|val|version|visium|weights|worker"
    r"|model\.(baseline|scheduler|net\.rank|optimizer\.fused)"
    r"|encoder\.(adapter|hub|kwargs|layer|scales)|finetune(\.tiles)?|preprocess\.register|trainer\.\w+|logger\.\w+\.\w+|md5)|units|bin_um",
    "negative": r"tilt_deg|segmentation\.(min_overlap|context)|trainer\.devices|logger\.\w+\.version",
    "flag": r"encoder\.compile|intervals|page|preprocess\.register|logger\.tensorboard\.default_hp_metric|trainer\.deterministic"
    r"|model\.optimizer\.fused",
    "huge": r"max_pixels|encoder\.(stride|batch_size)|segmentation\.\w+|loss\.\w+|panel\.\w+|split\.\w+|logger\.\w+\.version"
    r"|trainer\.(devices|limit_\w+|num_sanity_val_steps)",
    "empty": r"(.*\.)?(tissues|datasets|markers|val|test|gmt|genes|figures|hidden|broad\.\w+)|trainer\.devices|callbacks|logger",
    "mapping": r"callbacks|logger|encoder\.kwargs|.*\.md5",
}
# wandb takes what it likes; `download` reads nothing of the choices that a tissue makes for training
ANYTHING = r"logger\.wandb\.(group|mode|settings.*)|download:(segmentation|panel|encoder|split|qc|units|bin_um).*"


@cache
def configured(command, choices):
    return plain(compose(command, [*REQUIRED.get(command, ()), *choices]))


def keys_of(node, prefix=()):
    for key, value in node.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*prefix, key))


def refusal(command, values):
    """The message; None if the values are taken."""
    try:
        check_values(command, values)
    except InputError as error:
        return in_config_terms(error)
    return None


def is_meant(command, name, kind, default):
    if isinstance(default, bool) and kind == "flag":
        return True
    if any(re.fullmatch(ANYTHING, each) for each in (name, f"{command}:{name}")):
        return True
    return kind in MEANT and re.fullmatch(MEANT[kind], name) is not None


@pytest.mark.parametrize(("command", "choices"), CHOICES)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line_that_names_its_key(command, choices):
    values = configured(command, choices)
    assert refusal(command, values) is None
    # of a second config of a command, what the first does not have
    known = set(keys_of(configured(command, ()))) if choices else set()
    faults = []
    for path in keys_of(values):
        if path in known:
            continue
        name = ".".join(map(str, path))
        for kind, value in WRONG.items():
            wrong = copy.deepcopy(values)
            node = wrong
            for key in path[:-1]:
                node = node[key]
            default, node[path[-1]] = node[path[-1]], value
            message = refusal(command, wrong)
            if message is None:
                if not is_meant(command, name, kind, default):
                    faults.append(f"{name}: takes {value!r}")
            elif not message.startswith((name, name.rpartition(".")[0])) or "\n" in message:
                faults.append(f"{name}: {value!r} is refused with {message!r}")
    assert not faults, "\n".join(faults)


def test_every_command_has_a_schema():
    assert tuple(SCHEMAS) == COMMANDS


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_is_known_and_none_is_left_out(command):
    values = configured(command, ())
    for key in values:
        less = {name: value for name, value in values.items() if name != key}
        message = refusal(command, less)
        assert message is None or message.startswith(key)
    assert refusal(command, values | {"nonsense": 1}).startswith("nonsense: no such key")
