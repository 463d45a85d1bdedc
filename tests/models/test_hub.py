"""Names on the Hub: where it cannot be reached, its cache here is used, and a model that is not there fails at once."""

import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from siglit.config import ImageTowerConfig, TokenizerConfig
from siglit.errors import UserError
from siglit.models.hub import hub_or_cache
from siglit.models.image_tower import ImageTower
from siglit.models.pretrained_text import load_text_model
from siglit.models.tokenizer import load_tokenizer
from tests.models.text_models import save_model


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """As without HF_HUB_OFFLINE, with a cache of its own; the Hub is at a port where no server listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at(monkeypatch, free.getsockname()[1])


def at(monkeypatch, port):
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


LOADED = {
    "timm": lambda: ImageTower(ImageTowerConfig(model="vit_tiny_patch16_224.augreg_in21k")),
    "hf-hub": lambda: ImageTower(ImageTowerConfig(model="hf-hub:siglit-tests/absent")),
    "text": lambda: load_text_model("siglit-tests/absent"),
    "tokenizer": lambda: load_tokenizer("siglit-tests/absent", TokenizerConfig()),
}


@pytest.mark.parametrize("kind", LOADED)
def test_an_unreachable_hub_is_reported_at_once(kind):
    """huggingface_hub alone tries again for 23 to 48 s."""
    begun = time.monotonic()
    with pytest.raises(
        UserError, match=rf"{constants.ENDPOINT} cannot be reached: .*its cache here does not"
    ) as raised:
        LOADED[kind]()
    assert time.monotonic() - begun < 8
    assert "\n" not in str(raised.value)
    assert not constants.HF_HUB_OFFLINE


def test_a_cached_model_is_loaded_where_the_hub_cannot_be_reached(tmp_path):
    kept = tmp_path / "hub/models--siglit-tests--bert"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("0" * 40)
    save_model(kept / "snapshots" / ("0" * 40))
    begun = time.monotonic()
    assert load_text_model("siglit-tests/bert")
    assert time.monotonic() - begun < 8


def test_a_hub_that_is_silent_is_waited_for_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at(monkeypatch, silent.getsockname()[1])
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer within 0.2 s|cannot be reached: .*timed out"):
            load_text_model("siglit-tests/absent")
        assert time.monotonic() - begun < 8


class LateServer(BaseHTTPRequestHandler):
    """A Hub that answers late, and that there is nothing."""

    def do_HEAD(self):
        time.sleep(0.3)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_slow_hub_is_a_hub(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), LateServer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        at(monkeypatch, server.server_port)
        with hub_or_cache():
            assert not constants.HF_HUB_OFFLINE
        with pytest.raises(FileNotFoundError, match="mine"), hub_or_cache():
            raise FileNotFoundError("mine")
        server.shutdown()


def test_offline_stays_offline_and_sends_no_request(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("siglit.models.hub.get_session", lambda: pytest.fail("the Hub was looked for"))
    with hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE


def test_folders_need_no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("siglit.models.hub._unreachable", lambda: pytest.fail("the Hub was looked for"))
    assert load_text_model(save_model(tmp_path / "model"))
    assert ImageTower(ImageTowerConfig(model="vit_tiny_patch16_224", pretrained=False, model_args={"depth": 1}))
