"""The tables of the page that say what became of a model's parts."""

from collections.abc import Sequence
from typing import Any

from comcat.report import wording
from comcat.report.data import SiteRow

_LOSS = wording.Metric(label="", show=wording.tiny)
_KINDS = {"qk": "QK", "vo": "VO", "linear": "linear", "units": "feed-forward", "tokens": "tokens"}


def blocks(sites: Sequence[SiteRow]) -> dict[str, Any]:
    """Block by block: what became of attention and feed-forward, what that costs, and what it is predicted to lose."""
    grouped: dict[str, list[SiteRow]] = {}
    for site in sites:
        if site.block:
            grouped.setdefault(site.block, []).append(site)
    grouped = {name: grouped[name] for name in wording.in_order(grouped)}
    roles = [r for r in ("attention", "feed-forward", "tokens") if r != "tokens" or any(s.role == r for s in sites)]
    rows = [
        {
            "name": name,
            "parts": [{"role": role.capitalize(), **_part([s for s in group if s.role == role])} for role in roles],
            "parameters": _before_after(group),
            "macs": _macs(group),
            "loss": _sum_of_losses(group),
        }
        for name, group in grouped.items()
    ]
    parts = [site for group in grouped.values() for site in group]
    total = {"parameters": _before_after(parts), "macs": _macs(parts), "loss": _sum_of_losses(parts)}
    headings = [role.capitalize() for role in roles]
    return {"rows": rows, "headings": headings, "total": total, "macs": total["macs"], "loss": total["loss"]}


def _part(group: Sequence[SiteRow]) -> dict[str, str]:
    """What became of one part of a block, and how that came: cost and predicted loss."""
    if not group:
        return {"what": "", "detail": ""}
    details = []
    if any(site.form for site in group):
        counts = [sum(getattr(s, f"parameters_{when}") for s in group) for when in ("before", "after")]
        details += [wording.share(*counts)] if counts[0] else []
        if loss := _sum_of_losses(group):
            details.append(f"predicted loss {loss}")
        rival = next((s.rival_loss for s in group if s.rival_loss is not None), None)
        if rival is not None:
            other = "low rank" if any(s.kind == "units" for s in group) else "fewer units"
            details.append(f"{other}: {wording.cell(rival, _LOSS)}")
    what = ", ".join(_said(site) for site in group)
    ranked = any(site.kind == "linear" and site.form for site in group)
    return {"what": f"ranks {what}" if ranked else what, "detail": " · ".join(d for d in details if d)}


def _said(site: SiteRow) -> str:
    """A site in a few words: ``QK 16 of 64``, ``512 of 1,536 units``, ``fc1 64 of 192``, ``fc2 stays``."""
    name = {"qk": "QK ", "vo": "VO ", "units": "", "tokens": ""}.get(site.kind, f"{site.name.rpartition('.')[2]} ")
    if site.form is None:
        return "stays" if not name else f"{name}stays"
    kept = f"{name}{wording.plain(float(site.keep or 0))} of {wording.plain(float(site.full))}"
    form = "" if site.form in ("product", "units") else f" ({site.form.replace('_', ' ')})"
    counted = {"units": " units", "tokens": " tokens"}.get(site.kind, "")
    return kept + counted + form


def _before_after(group: Sequence[SiteRow]) -> str:
    before, after = (sum(getattr(s, f"parameters_{when}") for s in group) for when in ("before", "after"))
    return f"{wording.scaled(before)} → {wording.scaled(after)}" if before else ""


def _macs(group: Sequence[SiteRow]) -> str:
    known = [(s.macs_before, s.macs_after) for s in group if s.macs_before is not None and s.macs_after is not None]
    if not known:
        return ""
    return " → ".join(wording.scaled(sum(values)) for values in zip(*known, strict=True))


def _sum_of_losses(group: Sequence[SiteRow]) -> str:
    known = [s.predicted_loss for s in group if s.predicted_loss is not None]
    return wording.cell(sum(known), _LOSS) if known else ""


def site_table(sites: Sequence[SiteRow]) -> dict[str, Any]:
    """The table of all sites; columns nobody filled are left out."""
    rows = [
        {
            "name": site.name,
            "kind": _KINDS[site.kind],
            "kept": _kept(site),
            "full": wording.plain(float(site.full)) if site.full else "",
            "before": wording.plain(float(site.parameters_before)),
            "after": wording.plain(float(site.parameters_after)),
            "change": wording.share(site.parameters_before, site.parameters_after),
            "loss": wording.cell(site.predicted_loss, _LOSS),
            "note": site.note,
        }
        for site in sites
    ]
    before, after = (sum(getattr(site, f"parameters_{when}") for site in sites) for when in ("before", "after"))
    return {
        "rows": rows,
        "has_loss": any(row["loss"] for row in rows),
        "has_note": any(row["note"] for row in rows),
        "before": wording.plain(float(before)),
        "after": wording.plain(float(after)),
        "change": wording.share(before, after),
    }


def _kept(site: SiteRow) -> str:
    if site.form is None:
        return "all"
    kept = wording.plain(float(site.keep or 0))
    return f"{kept} {site.kind}" if site.kind in ("units", "tokens") else f"rank {kept}"


def stayed(sites: Sequence[SiteRow]) -> list[dict[str, Any]]:
    """Sites that stayed as they are, by reason."""
    reasons: dict[str, list[str]] = {}
    for site in sites:
        if site.form is None:
            reasons.setdefault(site.note or "the plan leaves them as they are", []).append(site.name)
    return [{"reason": reason[:1].upper() + reason[1:], "names": names} for reason, names in reasons.items()]
