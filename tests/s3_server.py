"""An S3 server on loopback, and what is in its buckets."""

import os
from contextlib import contextmanager

import boto3
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def running_s3(port=0):
    """A server; gives host and port."""
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


class Bucket:
    """A bucket, empty at first: moto's servers of one process share their buckets."""

    def __init__(self, address, name):
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        url = f"http://{address[0]}:{address[1]}"
        self.client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        self.address, self.name, self.url = address, name, url
        self.client.create_bucket(Bucket=name)
        for key in self.names():
            self.delete(key)

    def names(self, prefix=""):
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])
        return [item["Key"] for item in found]

    def read(self, key):
        body = self.client.get_object(Bucket=self.name, Key=key)["Body"]
        content = body.read()
        body.close()
        return content

    def write(self, key, content):
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def delete(self, key):
        self.client.delete_object(Bucket=self.name, Key=key)


@contextmanager
def environment_of(url):
    """The variables that lead a client to a server, while the context lasts."""
    before = dict(os.environ)
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": url}
    try:
        yield
    finally:
        for name in (*KEYS, "AWS_ENDPOINT_URL"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
