"""Serve a language model at 3 bits per weight over HTTP, and say what memory it takes.

python examples/serve.py --port 8000
curl --data 'The capital of France is' localhost:8000
curl localhost:8000
"""

import argparse
import resource
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from torchcodec_weights import codec_weight_only, compression_report, quantize_
from torchcodec_weights.evaluation.models import load_smollm2, load_tiny

MODELS = {"smollm2": load_smollm2, "tiny": load_tiny}
LONGEST = 4096  # bytes of a prompt


class Handler(BaseHTTPRequestHandler):
    model: Any
    tokenizer: Any

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= LONGEST:
            return self.send_error(400, f"a prompt has 1 to {LONGEST} bytes")
        text = self.rfile.read(length).decode(errors="replace")
        prompt = self.tokenizer(text, return_tensors="pt")
        tokens = self.model.generate(**prompt, max_new_tokens=16, do_sample=False)
        self.answer(self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    def do_GET(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.answer(f"{compression_report(self.model).totals}\nProcess: {peak:,} bytes at most.")

    def answer(self, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    Handler.model, Handler.tokenizer = MODELS[args.model]()
    quantize_(Handler.model, codec_weight_only(bits=3, preset="fast"))
    server = HTTPServer(("127.0.0.1", args.port), Handler)  # one request at a time
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
