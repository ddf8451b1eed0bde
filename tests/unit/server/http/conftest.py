"""An app over a fake engine, without a network, and builders for scripted answers."""

from collections.abc import Callable
from dataclasses import dataclass

import fastapi
import pytest
from starlette.testclient import TestClient

from diptych.server.http.app import make_app
from diptych.server.http.settings import HttpSettings
from diptych.server.text.tokenizer import Tokenizer
from tests.support.fake_client import FakeClient
from tests.support.tokenizers_small import write_byte_level

EOS = 1


@dataclass
class Site:
    """One server: `http` speaks to it, `engine` is what it stands on."""

    app: fastapi.FastAPI
    http: TestClient
    engine: FakeClient
    tokenizer: Tokenizer


MakeSite = Callable[..., Site]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def make_site(tokenizer: Tokenizer) -> MakeSite:
    """`make_site(text, chunk=1, **settings)`: every choice answers `text`, then EOS."""

    def make(text: str = "hello world", *, chunk: int = 1, **settings: object) -> Site:
        ids = [*tokenizer.encode(text, add_special_tokens=False), EOS]
        engine = FakeClient(
            lambda prompt, params, choice: ids,
            vocab_size=tokenizer.vocab_size,
            eos=EOS,
            chunk=chunk,
        )
        options = {"model_names": ["tiny", "alias"], **settings}
        app = make_app(engine, tokenizer, HttpSettings(**options))  # type: ignore[arg-type]
        return Site(app, TestClient(app, raise_server_exceptions=False), engine, tokenizer)

    return make


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site()
