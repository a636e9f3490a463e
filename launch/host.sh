#!/usr/bin/env bash
# What every host runs: the run begins, or goes on from its last checkpoint.
#   bash launch/host.sh CONFIG.yaml DIR [more of `fedjax-lora run`]
# DIR is on a file system that all hosts see.
set -euo pipefail
config=$1 out=$2
shift 2
resume=()
if [[ -f "$out/config.yaml" ]]; then
  resume=(--resume)
fi
exec fedjax-lora run "$config" --out "$out" "${resume[@]}" "$@"
