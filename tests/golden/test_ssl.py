"""MERT and m-HuBERT features against the original's values."""

from __future__ import annotations

import pytest
import torch
from transformers import HubertConfig, HubertModel

from acestep_ray.models.ssl import SETTINGS, SSLEncoder


@pytest.fixture(scope="module")
def hubert(golden) -> HubertModel:
    model = HubertModel(HubertConfig(**golden.manifest["hubert_config"])).eval()
    golden.fill(model, "/hubert")
    return model


@pytest.fixture(scope="module")
def songs(golden) -> list[torch.Tensor]:
    case = golden.manifest["cases"]["ssl"]
    state = golden.random_state(case["tag"])
    return [torch.from_numpy(state.standard_normal((2, case[n])) * 0.1).float() for n in ("n1", "n2")]


def test_hubert_parameters_have_the_names_and_shapes_of_the_golden_set(golden, hubert):
    parameters = {name: list(parameter.shape) for name, parameter in hubert.named_parameters()}
    assert parameters == golden.manifest["hubert_keys"]


@pytest.mark.parametrize("song", [0, 1])
@pytest.mark.parametrize(("name", "atol"), [("mert", 1e-5), ("m-hubert", 1e-4)])
def test_features_match_the_original(golden, hubert, songs, name, atol, song):
    features = SSLEncoder(name, *SETTINGS[name], hubert).encode(songs[song])
    torch.testing.assert_close(features, golden.tensors[f"ssl/out/{name}/{song}"], rtol=1e-4, atol=atol)
