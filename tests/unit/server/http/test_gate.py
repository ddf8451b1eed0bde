"""Who may pass: keys, drain, request ids; and the small routes."""

import pytest

from diptych.engine.core.errors import ConfigError
from diptych.server.client import Health
from diptych.server.http.app import front_of
from diptych.server.http.settings import HttpSettings, check_bind
from tests.unit.server.http.conftest import MakeSite, Site

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def test_keys_guard_everything_but_the_open_paths(make_site: MakeSite) -> None:
    site = make_site(api_keys=["sekrit", "other"])
    routes = {(m, r.path) for r in site.app.routes for m in r.methods}  # type: ignore[attr-defined]
    assert len(routes) >= 12
    for method, path in sorted(routes | {("GET", "/nowhere"), ("POST", "//v1/completions")}):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sekrit"}):
            response = site.http.request(method, path, headers=headers)
            if path in ("/health", "/ready", "/ping", "/metrics"):
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (method, path)
            if method != "HEAD":  # whose answers have no body
                assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for key in ("sekrit", "other"):
        headers = {"Authorization": f"Bearer {key}"}
        assert site.http.get("/v1/models", headers=headers).status_code == 200
    assert site.engine.calls == []


def test_binding() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"):
        check_bind(host, [])
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="--api-key"):
            check_bind(host, [])
        check_bind(host, ["key"])
    with pytest.raises(ConfigError, match="model name"):
        HttpSettings(model_names=[]).verify()
    with pytest.raises(ConfigError, match="empty"):
        HttpSettings(model_names=["a"], api_keys=[""]).verify()


def test_request_ids(site: Site) -> None:
    assert (
        site.http.get("/health", headers={"X-Request-Id": "a-1"}).headers["x-request-id"] == "a-1"
    )
    other = site.http.get("/health", headers={"X-Request-Id": "bad id\t"}).headers["x-request-id"]
    assert other.startswith("0-")
    response = site.http.post(
        "/v1/chat/completions",
        json={**HELLO, "request_id": "mine"},
        headers={"X-Request-Id": "outer"},
    )
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["id"] == "chatcmpl-mine"
    site.http.post("/v1/chat/completions", json={**HELLO, "request_id": "mine"})
    internal = [call[0] for call in site.engine.calls]
    assert len(set(internal)) == 2
    assert "mine" not in internal


def test_drain(site: Site) -> None:
    front_of(site.app).begin_drain()
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        response = site.http.post(path, json=HELLO)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "server_draining"
    assert site.http.get("/health").status_code == 503
    assert site.http.get("/metrics").status_code == 200
    assert site.http.get("/v1/models").status_code == 200


def test_too_many_in_flight(make_site: MakeSite) -> None:
    site = make_site(in_flight_max=0)
    response = site.http.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_health(site: Site) -> None:
    for path in ("/health", "/ready"):
        assert site.http.get(path).json() == {"status": "ok"}
        head = site.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    for method in ("GET", "POST"):
        assert site.http.request(method, "/ping").json() == {"status": "Healthy"}
    site.engine.healthy = Health(False, "no step for 5 s")
    for path in ("/health", "/ready", "/ping"):
        response = site.http.get(path)
        assert response.status_code == 503
        assert "no step for 5 s" in response.json()["error"]["message"]


def test_small_routes(site: Site) -> None:
    models = site.http.get("/v1/models").json()
    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["tiny", "alias"]
    assert site.http.get("/v1/models/alias").json() == models["data"][1]
    assert models["data"][0]["max_model_len"] == 128
    assert site.http.get("/version").json() == {"version": "0.1.0"}
    assert site.http.get("/load").json() == {"server_load": 0}


def test_slashes_in_model_names(make_site: MakeSite) -> None:
    site = make_site(model_names=["org/model"])
    assert site.http.get("/v1/models/org/model").json()["id"] == "org/model"
