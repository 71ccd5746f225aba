"""For several tests: a store in a folder and one in a bucket of a moto server on 127.0.0.1; a page of a browser."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from pipelines import s3
from pipelines.artifacts import LocalStore, Store
from pipelines.s3 import S3Store
from tests import browser


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()  # it keeps the endpoint that it was made for
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield name
    s3._client.cache_clear()


@pytest.fixture(params=["local", "s3"])
def either_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return S3Store(request.getfixturevalue("bucket"), "some/prefix")


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    with browser.page() as opened:
        opened.allow_clipboard()
        yield opened


@pytest.fixture
def no_complaint(page: browser.Page) -> Iterator[None]:
    """No error of a script, no refusal by the page's rules, whatever a test shows."""
    page.look()
    page.complaints.clear()
    yield
    page.run("0")  # what the browser has said by now is read
    assert [said for said in page.complaints if "Failed to load resource" not in said] == []  # 4xx, 5xx: asked for
