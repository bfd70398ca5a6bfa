"""One tiny model, one seed, no network: what every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub
import pytest
import torch
from hub_stand_in import HubStandIn

from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration

IMAGE_TOKEN = 5


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_config(**text):
    """A valid config of some ten thousand parameters with sparse layers in tower, connector and decoder."""
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return MoeVlmConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "stem_channels": (4, 8, 8),
            "moe_layers": "last_half",
            **sparse,
        },
        connector_config={"pixel_shuffle_factor": 2, **sparse},
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "initializer_range": 0.2,
            **sparse,
            **text,
        },
        image_token_id=IMAGE_TOKEN,
    )


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture
def tiny(config):
    """A tiny model in evaluation mode; `.train()` it where a test trains."""
    return MoeVlmForConditionalGeneration(config).eval()


@pytest.fixture
def batch(config):
    """Two rows of 24 tokens, one picture each in front: input_ids, pixel_values, attention_mask, labels."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(6, config.text_config.vocab_size, (2, 24), generator=generator)
    input_ids[:, 1 : 1 + config.image_seq_length] = IMAGE_TOKEN
    labels = input_ids.clone()
    labels[:, :12] = -100
    size = config.vision_config.image_size
    return {
        "input_ids": input_ids,
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process and its children talk to."""
    with HubStandIn() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        forget_sessions()
        yield stand_in
    forget_sessions()


def forget_sessions():
    """The Hub's client decides once, when it opens a session, whether it is offline."""
    hub = huggingface_hub
    getattr(hub, "close_session", None) and hub.close_session()
    getattr(hub, "configure_http_backend", None) and hub.configure_http_backend()
