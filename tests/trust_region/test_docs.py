"""Every region has its page, and what the pages show is true."""

from __future__ import annotations

import inspect
import re
import types

import jsonargparse
import pytest
import torch
import yaml

import dppo_lightning.trust_region as package
from dppo_lightning.trust_region import TrustRegion
from tests.helpers.places import ROOT
from tests.trust_region.batches import random_batch, stats
from tests.trust_region.cases import DEFAULTS

DOCS = ROOT / "docs"
NAMES = [type(case.region).__name__ for case in DEFAULTS]


def build(config: dict) -> TrustRegion:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TrustRegion, "trust_region")
    return parser.instantiate_classes(parser.parse_object(config)).trust_region


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_figure_defaults_and_a_configuration_that_builds(name):
    page = (DOCS / "trust-regions" / f"{name}.md").read_text()
    assert f"`dppo_lightning.trust_region.{name}`" in page
    (figure,) = re.findall(r"\]\((\.\./figures/[^)]+)\)", page)
    assert (DOCS / "trust-regions" / figure).is_file()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert type(build(yaml.safe_load(block)["model"])).__name__ == name

    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^`]+`|required) \|", page, re.MULTILINE))
    parameters = inspect.signature(getattr(package, name)).parameters
    assert list(rows) == list(parameters)
    for argument, parameter in parameters.items():
        default = parameter.default
        if default is inspect.Parameter.empty:
            assert rows[argument] == "required"
        else:
            assert rows[argument] == ("`null`" if default is None else f"`{default}`")


def test_the_index_links_every_page_and_every_link_exists():
    index = (DOCS / "trust-regions.md").read_text()
    linked = set(re.findall(r"\(trust-regions/(\w+)\.md\)", index))
    assert linked == set(NAMES)
    assert {path.stem for path in (DOCS / "trust-regions").glob("*.md")} == set(NAMES)
    for path in [DOCS / "trust-regions.md", DOCS / "write-your-own.md", *(DOCS / "trust-regions").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links {target}"


def test_the_code_of_write_your_own_runs():
    page = (DOCS / "write-your-own.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3  # the last one's are no regions
    module = types.ModuleType("my_regions")
    for block in blocks[:2]:
        exec(block, module.__dict__)
    tokens = stats(random_batch(2, drift=3.0), dtype=torch.float32)
    hellinger = module.HellingerMask(delta=0.02)
    assert hellinger.describe()["region"] == "HellingerMask"
    assert 0 < int((~hellinger(tokens).keep).sum()) < len(tokens.logp)
    gate = module.EntropyGate(least=1.0)
    assert torch.equal(gate(tokens).keep, tokens.entropy > 1.0)
    assert len(blocks[0].strip().splitlines()) <= 10


def test_every_region_has_a_figure():
    assert {path.stem for path in (DOCS / "figures").glob("region_*.png")} == {f"region_{name}" for name in NAMES}
    assert sum(path.stat().st_size for path in (DOCS / "figures").glob("region_*.png")) < 1_500_000
