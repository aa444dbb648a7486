import pytest

from pipeline.program import InputError
from pipeline.shard_cache import GIB, CacheConfig
from pipeline.shard_store import ShardStore
from pipeline.upload_set import upload


@pytest.mark.usefixtures("bucket")
def test_an_uploaded_set_is_read_back_from_there(shard_set, tmp_path, clean_pictures):
    names = [path.name for path in upload(shard_set, "s3://bucket/my/set")]
    assert names[-1] == "manifest.json" and len(names) == 7
    store = ShardStore("s3://bucket/my/set", CacheConfig(folder=tmp_path, gib=10_000_000 / GIB))
    assert store.manifest.sha256 == ShardStore(shard_set).manifest.sha256
    found = [store.picture(0, index).tobytes() for index in range(9)]
    assert found == clean_pictures[:9]
    store.close()


def test_a_half_has_no_manifest_and_the_same_set_can_follow(bucket, shard_set):
    going = upload(shard_set, "s3://bucket/set")
    for _ in range(3):
        next(going)
    going.close()
    assert len(bucket.names()) == 3 and "set/manifest.json" not in bucket.names()
    for _ in range(2):  # also when it is finished
        assert len(list(upload(shard_set, "s3://bucket/set"))) == 7
    assert len(bucket.names()) == 7


@pytest.mark.usefixtures("bucket")
def test_another_set_is_not_overwritten(shard_set, tmp_path, clean_pictures, pack_set):
    list(upload(shard_set, "s3://bucket/set"))
    other = pack_set(tmp_path / "other", clean_pictures, (40,))
    with pytest.raises(InputError, match="already holds another set"):
        list(upload(other, "s3://bucket/set"))


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/set", "give s3:// or gs://"),
        ("folder", "give s3:// or gs://"),
        ("s3://no-such-bucket/set", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_an_input_error(shard_set, url, message):
    with pytest.raises(InputError, match=message):
        list(upload(shard_set, url))
