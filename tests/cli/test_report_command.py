"""What `prts report` refuses before it reads anything."""

import pytest

from prts.cli.app import run


@pytest.mark.parametrize("region", ["[a,0,5,5]", "[0,0,5]", "5", "whole"])
def test_a_region_is_four_numbers(region, tmp_path, capsys):
    arguments = ["prediction=p.h5ad", "image=x.tif", f"out={tmp_path / 'report'}", f"region={region}"]
    assert run("report", arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give [x0,y0,x1,y1] in full-resolution px" in error
    assert not (tmp_path / "report").exists()
