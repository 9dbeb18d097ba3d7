"""Addresses that contain secrets: they work, and no output shows the secret. Small remote files have a size limit."""

import base64
import traceback
from pathlib import Path

import numpy as np
import pytest

from jitscale.addresses import has_secret, masked
from jitscale.config import load_config, to_yaml
from jitscale.data import manifest, remote
from jitscale.data.manifest import Manifest
from jitscale.data.remote import read_remote
from jitscale.data.shards import ShardSet, open_setting
from jitscale.errors import DataError
from jitscale.preparation.array_shards import write_shards
from tests.support.pictures import numbered, samples_of
from tests.support.servers import Storage, serving


@pytest.mark.parametrize("given", ["in the address", "in netrc", "in a query"])
def test_storage_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    folder = tmp_path / "shards"
    write_shards(numbered(6), np.arange(6) % 3, folder, codec="raw", samples_per_shard=2)
    monkeypatch.setattr(remote, "_file_systems", {})
    login = "anna:p4ss"
    wanted = "?token=p4ss" if given == "in a query" else f"Basic {base64.b64encode(login.encode()).decode()}"
    with serving(folder, only_with=wanted) as url:
        address = url.replace("//", f"//{login}@") if given == "in the address" else url
        query = wanted if given == "in a query" else ""
        if given == "in netrc":
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            (tmp_path / "netrc").write_text("machine 127.0.0.1 login anna password p4ss\n")
            (tmp_path / "netrc").chmod(0o600)
        for pattern in (address, f"{address}/shard-{{000000..000002}}.tar"):
            shards = ShardSet.open(pattern + query, 3, cache_dir=tmp_path / "cache")
            assert samples_of(shards) == samples_of(ShardSet.open(folder, 3))
            assert 0 < shards.without_fraction(0.5).num_samples < 6
        wrong = f"{url.replace('//', '//anna:s3cret@')}/manifest.json?token=s3cret"
        monkeypatch.setattr(remote, "_file_systems", {})
        (tmp_path / "netrc").unlink(missing_ok=True)
        with pytest.raises(DataError) as caught:
            read_remote(wrong)
    assert "http://***@" in str(caught.value)
    assert "?token=***: access is refused" in str(caught.value)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://host/a.tar?X-Amz-Signature=s3cret&X-Amz-Expires=9", "its signature is valid for one file"),
        ("https://host/a?AWSAccessKeyId=s3cret&Signature=s3cret", "its signature is valid for one file"),
        ("https://host/a?sr=b&sig=s3cret", "its signature is valid for one file"),
        ("https://***@host/a", r"its secret is masked.*give data.shards=ADDRESS again"),
        ("https://host/a?token=***", r"its secret is masked.*give data.shards=ADDRESS again"),
    ],
)
def test_addresses_that_cannot_work_are_refused(address: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ShardSet.open(address, 3)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://a:b@host/x/s-{0..3}.tar: gone", "https://***@host/x/s-{0..3}.tar: gone"),
        ("at 'https://h/x?sig=a%2Fb&se=1'; no", "at 'https://h/x?sig=***&se=***'; no"),
        ("https://h/x?token=a: no (http://t@h/y)", "https://h/x?token=***: no (http://***@h/y)"),
        ("s3://bucket/a@b and /data/{a,b}/s-?.tar", "s3://bucket/a@b and /data/{a,b}/s-?.tar"),
        ("https://***@host/x?token=***", "https://***@host/x?token=***"),
        ("https://me:p/a?s#s'@w@host/x: gone", "https://***@host/x: gone"),
        ("https://a:b/c@h/x,https://d:e@h/y", "https://***@h/x,https://***@h/y"),
        ("http://h:80/a@b 'http://h:80' and a@b", "http://h:80/a@b 'http://h:80' and a@b"),
        ("https://h/x?c2VjcmV0LXRva2Vu&v=1", "https://h/x?***&v=***"),
        ("https://h/x?c2VjcmV0LXRva2Vu: gone", "https://h/x?***: gone"),
        ("https://h/x#access_token=s3cret&n=1; no", "https://h/x#access_token=***&n=***; no"),
        ("https://h/x?v=1#access_token=s3cret", "https://h/x?v=***"),
        ("https://h/docs.html#the-title-of-a-section, see", "https://h/docs.html#the-title-of-a-section, see"),
        ("https://me:123456/p@host/x", "https://***@host/x"),
        ("https://host:65535/a@b", "https://host:65535/a@b"),
        ("https://h/s-?-of-000000000012.tar s-?.tar", "https://h/s-?-of-000000000012.tar s-?.tar"),
    ],
)
def test_masked_addresses(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(
    ("address", "has"),
    [
        ("https://anna:s3cret@h/${run.seed}", True),
        ("https://anna:s3cret@h/x?token=${oc.env:A}", True),
        ("https://${oc.env:A}:s3cret@h/x", True),
        ("https://anna:${oc.env:A,s3cret}@h/x", True),
        ("https://h/x?token=s3cret&seed=${run.seed}", True),
        ("https://anna:${oc.env:A}@h/x,https://anna:s3cret@h/y", True),
        ("https://s3cret:@h/${oc.env:A}", True),
        ("${oc.env:A}", False),
        ("https://anna:${oc.env:A}@h/x", False),
        ("https://${oc.env:A}:${oc.env:B}@h/${run.seed}/x-{0..3}.tar", False),
        ("https://${oc.env:A}@h:80/x,https://${oc.env:A}:@h/y", False),
        ("https://h/x?version=1&token=${oc.env:A}&end=2", False),
        ("https://h:80/${oc.env:A}/a@b", False),
    ],
)
def test_settings_that_contain_a_secret_are_masked(address: str, has: bool) -> None:
    assert has_secret(f"data.shards={address}") == has


def test_small_files_are_bounded(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = storage.add("a", bytes(1001))
    assert len(read_remote(url, 1001)) == 1001
    with pytest.raises(DataError, match=f"{url}: has more than 1000 bytes, too many"):
        read_remote(url, 1000)
    monkeypatch.setattr(manifest, "LARGEST_MANIFEST", 1000)
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"manifest\.json: has more than 1000 bytes, too many for a manifest"):
        ShardSet.open(tmp_path, 1)
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        Manifest.read("nested", b"[" * 1000)
    monkeypatch.setattr(manifest, "LARGEST_MANIFEST", 1 << 27)
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        Manifest.read("nested", b"[" * 1_000_000)


def test_only_the_process_and_not_the_stored_config_has_the_secrets(tmp_path: Path) -> None:
    address = "https://anna:p4ss@host/{resolution}/s-{0..3}.tar?token=p4ss"
    (tmp_path / "own.yaml").write_text(f"data: {{shards: '{address}', held_out: '{address}'}}\nrun: {{max_steps: 1}}")
    config = load_config(tmp_path / "own.yaml")
    assert config.data.shards == address
    (tmp_path / "stored.yaml").write_text(text := to_yaml(config))
    assert "p4ss" not in text
    stored = load_config(tmp_path / "stored.yaml")
    assert stored.data.shards == "https://***@host/{resolution}/s-{0..3}.tar?token=***"
    with pytest.raises(DataError, match=r"data.held_out: https://\*\*\*@host.*give data.held_out=ADDRESS again"):
        open_setting(stored, "data.held_out", 10)
    again = load_config(tmp_path / "stored.yaml", [f"data.shards={address}"])
    assert (again.data.shards, to_yaml(again)) == (address, text)
