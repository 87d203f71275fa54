"""Serves an exported model over HTTP: python examples/serve_http.py exported 8000; curl --data-binary @cat.jpg :8000

The export needs its StableHLO function: python export.py --workdir=runs/digits --output=exported --formats=stablehlo
"""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tokred import export, predict

model = export.load(sys.argv[1], "stablehlo")


class Handler(BaseHTTPRequestHandler):
  """An image in the body of a POST; its five likeliest classes and their probabilities come back as JSON."""

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    try:
      pixels = predict.read_image(io.BytesIO(body), model.config)
      status, answer = 200, predict.predict(model, pixels[None])[0]
    except ValueError as error:
      status, answer = 400, {"error": str(error)}
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.end_headers()
    self.wfile.write(json.dumps(answer).encode())


if __name__ == "__main__":
  ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
