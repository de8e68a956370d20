"""What is found in each model, and what is refused with which reason."""

from __future__ import annotations

import pytest
from torch import nn

from comcat.errors import UnsupportedSite

from .conftest import Subject


def test_products_are_found_or_refused_with_the_reason(subject: Subject) -> None:
    case, sites = subject.case, subject.sites
    attentions = {s.path: s.attention for s in sites.values() if s.kind in ("qk", "vo")}
    assert len(attentions) == case.attentions
    reasons = {r.name: r.reason for r in sites.refused}
    for path, attention in attentions.items():
        assert attention is not None and attention.mount in case.mount.split()
        for kind, expected in (("qk", case.qk), ("vo", case.vo)):
            name = f"{path}:{kind}"
            if expected is None or (kind == "qk" and path in case.qk_of):
                assert sites[name].kind == kind
            else:
                assert name not in sites and expected in reasons[name]
                with pytest.raises(UnsupportedSite, match=name):
                    sites[name]


def test_whole_modules_are_refused_with_the_reason(subject: Subject) -> None:
    reasons = {r.name: r.reason for r in subject.sites.refused}
    paths = {s.path for s in subject.sites.values()}
    for path, expected in subject.case.refused.items():
        assert expected in reasons[path]
        assert path not in paths


def test_no_linear_layer_is_forgotten(subject: Subject) -> None:
    spoken_for = {s.path for s in subject.sites.values()} | {r.name.partition(":")[0] for r in subject.sites.refused}
    for path, module in subject.original.named_modules():
        if isinstance(module, nn.Linear):
            assert any(path == p or path.startswith(f"{p}.") for p in spoken_for), path


def test_mlps_always_shrink(subject: Subject) -> None:
    """Whatever is refused of an attention, the feed-forward layers beside it are sites."""
    words, others = ("mlp", "fc", "intermediate", ".output."), ("attn.", "attention.", "shared_rel_pos")
    mlps = {
        p
        for p, m in subject.original.named_modules()
        if type(m) is nn.Linear and any(w in p for w in words) and not any(o in p for o in others)
    }
    assert mlps and mlps <= set(subject.sites.only("linear"))


def test_finding_changes_nothing(subject: Subject) -> None:
    fresh = subject.case.model()
    for (name, before), after in zip(fresh.state_dict().items(), subject.original.state_dict().values(), strict=True):
        assert before.equal(after), name
