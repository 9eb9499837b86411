"""Names of topologies and what is refused, each in one line, before anything is compiled."""

import pytest

from mosaicjax import cli
from mosaicjax.errors import InputError
from mosaicjax.hardware import CORES, chip_named
from mosaicjax.plan.topology import Topology


@pytest.mark.parametrize(
    ("text", "chips", "slices"),
    [("v5e:16x16", 256, 1), ("v5p:4x4x8", 256, 2), ("v4:2x2x1", 4, 1), ("v6e:2x4", 24, 3)],
)
def test_chips_are_counted(text, chips, slices):
    found = Topology.read(text, slices)
    assert (found.name, found.chips) == (text, chips)
    assert found.chip is chip_named(text.partition(":")[0])


@pytest.mark.parametrize("text", ["v9:2x2", "", "cpu:0", "cpu", "16x16"])
def test_an_unknown_chip_is_refused_with_the_list(text):
    with pytest.raises(InputError, match=f"unknown topology .*expected {', '.join(CORES)}, as v5e:16x16"):
        Topology.read(text)


@pytest.mark.parametrize(
    "text", ["v5e:3x3", "v5e", "v5e:4x4x4", "v6e:2x2x", "v5p:4x4", "v5p:4x4x6", "v4:0x4x4"]
)
def test_an_unknown_grid_is_refused_with_the_list(text):
    with pytest.raises(InputError, match=r"unknown topology .*expected \w+: with one of 1?2?x.*2x"):
        Topology.read(text)


def line(capsys, *words):
    assert cli.main(["plan", *map(str, words)]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    return found


def test_bad_input_is_one_line(capsys, tmp_path, tiny_recipe, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "unknown topology 'v7:2x2'; expected v4, v5e, v5p, v6e" in line(
        capsys, tiny_recipe, "--topology", "v7:2x2"
    )
    assert "nothing to plan for; fix: --topology v5e:16x16" in line(capsys, tiny_recipe)
    assert "--slices; expected 1 or more; got 0" in line(
        capsys, tiny_recipe, "--topology", "v5e:2x2", "--slices", "0"
    )
    assert "price of a chip hour is unusable; expected dollars, zero or more; got -1" in line(
        capsys, tiny_recipe, "--topology", "v5e:2x2", "--usd-per-chip-hour", "-1"
    )


def test_a_mesh_that_does_not_match_the_chips_is_one_line(capsys, tiny_recipe):
    words = (tiny_recipe, "--topology", "v5e:2x2", "--mesh.data", "3", "--mesh.fsdp", "1")
    found = line(capsys, *words)
    assert "the mesh does not match the devices; expected axes that multiply to 4; got data 3" in found
