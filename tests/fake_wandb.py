"""A stand-in for W&B's server, on this machine alone: it answers what the client, its agent and its file stream ask,
keeps what it is told, and fails as servers do."""

import collections
import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """HTTP 1.0, a connection a request: where the server is gone, the next request fails."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append(self.path)
        status, answer, name = 200, b"{}", None
        if server.fault == "silent":
            server.ended.wait()
            return
        if server.fault in ("error", "garbage"):
            status, answer = (500, b"oops") if server.fault == "error" else (200, b"<html>Please log in.</html>")
        elif self.path == "/graphql":
            request = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            with server.lock:
                data = getattr(server, name, lambda **_: None)(**request.get("variables", {}))
            answer = json.dumps({"data": data}).encode()
        elif self.path.endswith("/file_stream"):
            with server.lock:
                server.stream(self.path.split("/")[-2], json.loads(body))
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        if name == "UpsertBucket" and server.later:  # the run has started
            server.fail(server.later)

    do_PUT = do_GET = do_POST

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """runs: what each run is called and configured as; history: its rows; exit_codes: how often and how it ended;
    preempted: runs to be requeued.

    fault: "" or "refused", "silent" (accepts connections but never answers), "error" (HTTP 500), "garbage"; later: the
    fault that comes once a run has started; trials: configurations for agents, each to be run once.
    """

    daemon_threads = True

    def __init__(self, fault="", later="", program=None, trials=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.fault, self.later, self.program, self.trials = "", later, program, dict(trials)
        self.requests, self.runs = [], collections.defaultdict(dict)
        self.history, self.exit_codes = collections.defaultdict(list), collections.defaultdict(list)
        self.preempted, self.lock, self.ended = set(), threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.fail(fault)

    def fail(self, fault):
        self.fault = fault
        if fault == "refused":
            self.shutdown()
            self.socket.close()

    def close(self):
        self.ended.set()
        self.fail("refused")

    def stream(self, run, told):
        """Rows of the history, by their place in it; at the end the exit code."""
        if rows := told.get("files", {}).get("wandb-history.jsonl"):
            self.history[run][rows["offset"] :] = map(json.loads, rows["content"])
        if told.get("preempting"):
            self.preempted.add(run)
        if told.get("complete"):
            self.exit_codes[run].append(told["exitcode"])

    # Answers, by the name of the question

    def Viewer(self):
        return {"viewer": {"id": "1", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}

    def RunResumeStatus(self, name, **_):
        bucket, rows = None, [json.dumps(row) for row in self.history[name]]
        if name in self.runs:  # the client takes a run without "t" for one that never started
            bucket = {"id": name, "name": name, "config": self.runs[name]["config"], "wandbConfig": '{"t": 1}'}
            bucket |= {"historyTail": json.dumps(rows[-1:]), "historyLineCount": len(rows), "eventsTail": "[]"}
            bucket |= {"summaryMetrics": "{}", "eventsLineCount": 0, "logLineCount": 0, "tags": []}
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}}

    def UpsertBucket(self, name, **told):
        inserted = name not in self.runs
        self.runs[name] |= {key: value for key, value in told.items() if value is not None}
        project = {"id": "p", "name": told.get("project") or "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": name, "name": name, "displayName": told.get("displayName") or name, "project": project}
        bucket |= {"config": "{}", "historyLineCount": len(self.history[name])}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def CreateRunFiles(self, run, files, **_):
        files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def SweepWithRuns(self, sweep, **_):
        sweep = {"id": sweep, "name": sweep, "config": "method: grid", "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def CreateAgent(self, **_):
        return {"createAgent": {"agent": {"id": "agent"}}}

    def Heartbeat(self, id, runState, **_):
        """One trial at a time to each agent, then the end."""
        commands = []
        if not json.loads(runState):
            commands = [{"type": "exit"}]
            if self.trials:
                run, config = self.trials.popitem()
                args = {key: {"value": value} for key, value in config.items()}
                commands = [{"type": "run", "run_id": run, "program": self.program, "args": args}]
        return {"agentHeartbeat": {"agent": {"id": id}, "commands": json.dumps(commands)}}
