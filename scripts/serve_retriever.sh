#!/usr/bin/env bash
# The retriever of the real setting: BM25 over the Wikipedia dump of 2018 (21 million passages), port 8000.
#   bash scripts/serve_retriever.sh wiki-18.jsonl [INDEX_FOLDER]
set -euo pipefail

corpus=${1:?"usage: serve_retriever.sh CORPUS.jsonl [INDEX_FOLDER]"}
index=${2:-runs/index/wiki-18-bm25}

sleuth index --corpus "$corpus" --out "$index"   # at once if it is there already
exec sleuth serve --index "$index" --host 127.0.0.1 --port 8000 --topk 3
