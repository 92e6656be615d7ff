"""A stand-in for the server of Weights & Biases on this machine, for the real client and the real `wandb agent`."""

import collections
import contextlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """HTTP 1.0, one connection per request: once the server is gone, the next request fails."""

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
    """runs: name and configuration of each run; history: its rows; exit_codes: those with which it ended.

    fault: "" or "refused", "silent" (accepts connections but never answers), "error" (HTTP 500), "garbage"; later: the
    fault that comes once a run has started.
    """

    daemon_threads = True

    def __init__(self, fault="", later=""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.fault, self.later = "", later
        self.requests, self.runs = [], collections.defaultdict(dict)
        self.history, self.exit_codes = collections.defaultdict(list), collections.defaultdict(list)
        self.lock, self.ended = threading.Lock(), threading.Event()
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
        """Takes rows of the history, by their place in it; at the end the exit code."""
        if rows := told.get("files", {}).get("wandb-history.jsonl"):
            self.history[run][rows["offset"] :] = map(json.loads, rows["content"])
        if told.get("complete"):
            self.exit_codes[run].append(told["exitcode"])

    # Answers, by the name of the query

    def Viewer(self):
        return {"viewer": {"id": "1", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}

    def RunResumeStatus(self, name, **_):
        bucket, rows = None, [json.dumps(row) for row in self.history[name]]
        if name in self.runs:  # without "t" the client thinks that the run never started
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


class Sweep(Server):
    """Hands each run of a grid to one agent, and a run that was preempted again to the next agent that asks.

    handed: the agent and the run of each command, in order. Its methods run one at a time, under `lock`.
    """

    def __init__(self, config):
        self.config, self.handed, self.preempted, self.agents = config, [], set(), 0
        names, values = zip(*((name, x.get("values", [x.get("value")])) for name, x in config["parameters"].items()))
        self.waiting = [(f"run{i}", dict(zip(names, x))) for i, x in enumerate(itertools.product(*values))]
        self.grid = dict(self.waiting)
        super().__init__()

    def stream(self, run, told):
        super().stream(run, told)
        if told.get("preempting"):
            self.preempted.add(run)
        if told.get("exitcode") and run in self.preempted:
            self.waiting.append((run, self.grid[run]))

    def SweepWithRuns(self, **_):
        return {
            "project": {"sweep": {"id": "s", "name": "s", "config": json.dumps(self.config), "runs": {"edges": []}}}
        }

    def CreateAgent(self, **_):
        self.agents += 1
        return {"createAgent": {"agent": {"id": str(self.agents - 1)}}}

    def Heartbeat(self, id, runState, **_):
        commands = []
        if not json.loads(runState) and self.waiting:
            run, options = self.waiting.pop(0)
            self.handed.append((id, run))
            arguments = {name: {"value": value} for name, value in options.items()}
            commands = [{"type": "run", "run_id": run, "program": self.config["program"], "args": arguments}]
        elif not json.loads(runState):
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": id}, "commands": json.dumps(commands)}}
