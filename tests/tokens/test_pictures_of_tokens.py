"""Pictures of merged tokens, and of maps before and after, in the report."""

import base64
import copy
import io
import json

import numpy as np
import pytest
import torch

import comcat
from comcat.errors import SettingsError, StoreError
from comcat.report import ReportData, ShownPicture, render
from comcat.report.overlays import shown_pictures

from ..models import pictures, tiny_vit
from ..test_report import Page, empty, site


def an_image(pixels=b"x"):
    return "data:image/jpeg;base64," + base64.b64encode(pixels).decode()


def decoded(address):
    from PIL import Image

    head, _, text = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(float) / 255


class Map(torch.nn.Module):
    """A tiny segmenter: logits of some classes, or of a mask, at every patch of a vision transformer."""

    def __init__(self, channels):
        super().__init__()
        self.num_classes = channels
        self.backbone, self.head = tiny_vit(num_classes=0), torch.nn.Conv2d(48, channels, 1)

    def forward(self, x):
        rows = self.backbone.forward_features(x)[:, 1:]
        return torch.nn.functional.interpolate(self.head(rows.mT.unflatten(2, (4, -1))), scale_factor=8)


def shown_of(model, keep=0.5, **settings):

    from comcat.report.overlays import shown_pictures

    x, small = pictures(3)[0][:3], copy.deepcopy(model)
    plan = comcat.merge(small, example=x[:1], keep=keep, **settings)
    comcat.apply_(small, plan)
    return shown_pictures(model, small, x), plan, small, x


@pytest.mark.parametrize("how", ["similar", "grid", "drop"])
def test_pictures_show_which_tokens_ran_as_one(how):

    model = tiny_vit()
    seen, plan, small, x = shown_of(model, how=how, keep=0.7)
    assert len(seen) == 3 and all(set(s.blocks) == {n.removesuffix(":tokens") for n in plan.sites} for s in seen)
    assert all(s.counts["blocks.1"] == f"{plan.sites['blocks.1:tokens'].keep} of 16" for s in seen)
    assert seen[0].maps == {} and "reduction" not in vars(small.blocks[1].token_reduction)
    before, after = decoded(seen[0].picture), decoded(seen[0].blocks["blocks.1"])
    changed = np.abs(after - before).mean(-1).reshape(4, before.shape[0] // 4, 4, -1).mean((1, 3))  # by token
    if how == "drop":
        rested = after.reshape(4, after.shape[0] // 4, 4, -1, 3).mean((1, 3, 4)) < 0.6 * before.reshape(
            4, before.shape[0] // 4, 4, -1, 3
        ).mean((1, 3, 4))
        assert rested.sum() == 16 - plan.sites["blocks.1:tokens"].keep
    else:
        block, handle = small.blocks[1], []
        hook = block.register_forward_pre_hook(lambda b, args: handle.append(b.token_reduction.reduction(b, args[0])))
        with torch.no_grad():
            small(x)
        hook.remove()
        numbers = torch.arange(handle[0].count).float().expand(3, -1)[..., None].contiguous()
        of = handle[0].spread(numbers)[0, -16:, 0].long()
        alone = (of.bincount()[of] == 1).view(4, 4).numpy()
        assert alone.any() == (how == "similar") and (changed[~alone] > 0.05).all()
        assert changed[alone].max(initial=0) < changed[~alone].min()


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_models_show_their_maps(channels):
    torch.manual_seed(0)
    model = Map(channels).eval()
    seen, _, small, x = shown_of(model, keep=0.4)
    assert all(set(s.maps) == {"before", "after"} for s in seen)
    for when, m in (("before", model), ("after", small)):
        with torch.no_grad():
            said, drawn = m(x)[0], decoded(seen[0].maps[when])
        points = drawn[drawn.shape[0] // 8 :: drawn.shape[0] // 4, drawn.shape[1] // 8 :: drawn.shape[1] // 4]
        if channels == 1:
            assert np.abs(points[..., 0] - said.sigmoid()[0, ::8, ::8].numpy()).max() < 0.1
        else:
            classes = said.argmax(0)[::8, ::8].numpy()
            hues = [points[classes == c] for c in range(3) if (classes == c).any()]
            assert all(np.ptp(h, axis=0).max() < 0.2 for h in hues)
    assert any(s.maps["before"] != s.maps["after"] for s in seen)


def test_models_without_merged_tokens_have_nothing_to_show():

    model = tiny_vit()
    assert shown_pictures(model, model, pictures(2)[0]) == ()


def test_the_page_shows_pictures_of_tokens():
    row = site("a.layer.3:tokens", "tokens", form="similar", keep=12, full=16, block="a.layer.3", role="tokens")
    seen = ShownPicture(
        picture=an_image(), blocks={"a.layer.3": an_image(b"y")}, counts={"a.layer.3": "12 of 16"},
        maps={"before": an_image(b"z"), "after": an_image(b"w")},
    )  # fmt: skip
    data = empty(sites=(row,), pictures=(seen,), agreement={"agreement": 90.0, "count": 3})
    assert ReportData.from_json(data.to_json()).pictures == (seen,)
    page = Page(render(data))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [i["src"] for i in images] == [an_image(), an_image(b"z"), an_image(b"w"), an_image(b"y")]
    assert all(i["alt"] for i in images)
    assert "Which tokens ran as one" in page.text and "layer.3 12 of 16" in page.text and "Map before" in page.text
    assert "Tokens kept at each site" in page.text
    assert "same prediction as the original, pixel by pixel, 3 images" in page.text
    assert "Which tokens" not in Page(render(empty(sites=(row,)))).text


def test_a_picture_from_elsewhere_is_refused():
    with pytest.raises(SettingsError, match="data:image"):
        ShownPicture(picture="https://example.org/spy.png", blocks={}, counts={})
    with pytest.raises(SettingsError, match="counts"):
        ShownPicture(picture=an_image(), blocks={"a": an_image()}, counts={})
    text = json.loads(empty().to_json()) | {"pictures": [{"picture": an_image(), "blocks": {}}]}
    with pytest.raises(StoreError, match="counts"):
        ReportData.from_json(json.dumps(text))
