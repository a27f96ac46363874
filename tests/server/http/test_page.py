"""The page at `/`: its files, their headers, and the package that brings them. `make page-test` opens it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.access.keys import Keys
from server.http import static
from server.http.app import create_app
from server.services.predictive import Service

ROOT = Path(__file__).parents[3]
WEB = ROOT / "clients/web"
EXPORT = re.compile(r"export (?:async )?(?:function\*? |const |class )([\w$]+)")
UNSAFE = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|https?://(?!www\.w3\.org/2000/svg)|Storage")
SCRIPTS = sorted(path.name for path in WEB.glob("*.js"))


@pytest.fixture
def closed(service: Service) -> TestClient:
    """A server with a key, not shown here, that is not ready yet."""
    return TestClient(create_app(service, Keys("s3cret")))


def test_the_page_needs_no_key_and_holds_no_data(closed: TestClient) -> None:
    found = closed.get("/")
    assert found.status_code == 200 and found.headers["content-type"] == "text/html; charset=utf-8"
    assert found.content == (WEB / "index.html").read_bytes()  # the same for everybody: no model is named
    named = set(re.findall(r'(?:href|src)="(web/[^"]+)"', found.text))
    assert named == {"web/page.css", "web/doubt.css", "web/start.js"}
    for path in named:
        assert closed.get(f"/{path}").content == (WEB / path.removeprefix("web/")).read_bytes()


def test_the_page_may_run_and_load_only_its_own_files(closed: TestClient) -> None:
    for path in ("/", "/web/start.js", "/web/page.css"):
        headers = closed.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    html = (WEB / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src)", html)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_imports_is_served(name: str, closed: TestClient) -> None:
    found = closed.get(f"/web/{name}")
    assert found.headers["content-type"] == "text/javascript; charset=utf-8"
    for other, names in re.findall(r'from "\./([^"]+)"|import "([^"]+)"', found.text):
        assert other in SCRIPTS and not names
    for wanted, other in re.findall(r'import {([^}]+)} from "\./([^"]+)"', found.text):
        exported = set(EXPORT.findall((WEB / other).read_text()))
        assert {each.split(" as ")[0].strip() for each in wanted.split(",")} <= exported
    assert not UNSAFE.search(found.text)


@pytest.mark.parametrize("name", ["index.html", "README.md", "..%2fapp.py", "%2e%2e/app.py", "", "x" * 5000, "%00"])
def test_no_other_file_is_served(name: str, closed: TestClient) -> None:
    assert closed.get(f"/web/{name}", follow_redirects=False).status_code == 404


def test_the_package_brings_every_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["server.http"]
    brought = {path.resolve() for pattern in patterns for path in (ROOT / "server/http").glob(pattern)}
    assert {WEB / name for name in ("index.html", *static.WEB.parts)} <= brought
    assert len(static.WEB.parts) == len([*WEB.glob("*.js"), *WEB.glob("*.css")]) > 10
