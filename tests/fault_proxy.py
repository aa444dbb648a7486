"""A loopback proxy in front of an HTTP server that does to answers what networks do.

``proxy.fault`` is called with the number of the request and its path and returns None or one of:
``("status", 503)``, ``("cut", bytes)``, ``("slow", seconds)``, ``("etag", text)``, ``("drop",)``.
``proxy.write_fault`` likewise for requests that change something, whose body ``("flip",)`` damages
and ``("throttle", bytes_per_second)`` lets through slowly.
"""

import http.client
import http.server
import threading
import time
from contextlib import contextmanager


class Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, target, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.target, self.fault = target, lambda *_: None
        self.requests, self.count_lock = [], threading.Lock()
        self.write_fault, self.writes = lambda *_: None, []
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.pass_on("GET")

    def do_HEAD(self):
        self.pass_on("HEAD")

    def do_PUT(self):
        self.pass_on("PUT", is_write=True)

    def do_POST(self):
        self.pass_on("POST", is_write=True)

    def do_DELETE(self):
        self.pass_on("DELETE", is_write=True)

    def pass_on(self, method, is_write=False):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        requests, faults = server.requests, server.fault
        if is_write:
            requests, faults = server.writes, server.write_fault
        with server.count_lock:
            number = len(requests)
            requests.append((self.path, method if is_write else self.headers.get("Range")))
        fault = faults(number, self.path) or ("none",)
        self.close_connection = fault[0] in ("cut", "drop")
        if fault[0] == "drop":
            return
        if fault[0] == "status":
            self.send_response(fault[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(*self.server.target)
        if fault[0] == "throttle":
            time.sleep(len(sent) / fault[1])
        if fault[0] == "flip" and sent:
            sent = bytes([sent[0] ^ 1]) + sent[1:]
        upstream.request(method, self.path, body=sent or None, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                changed = fault[0] == "etag" and name.lower() == "etag"
                self.send_header(name, fault[1] if changed else value)
        length = answer.getheader("Content-Length") if method == "HEAD" else str(len(body))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault[0] == "slow":
            self.wfile.write(body[:100])
            self.wfile.flush()
            time.sleep(fault[1])
            body = body[100:]
        self.wfile.write(body[: fault[1]] if fault[0] == "cut" else body)


@contextmanager
def proxy_to(host, port, own_port=0):
    """A running proxy; stopped at the end."""
    proxy = Proxy((host, port), own_port)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
