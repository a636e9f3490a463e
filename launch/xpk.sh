#!/usr/bin/env bash
# A TPU slice of Google Kubernetes Engine by xpk, which makes a JobSet and queues it with Kueue.
#   PROJECT=... ZONE=us-west4-a CLUSTER=fed IMAGE=... bash launch/xpk.sh CONFIG.yaml DIR [--dry-run]
# TPU_TYPE is v5litepod-8 if not given. IMAGE holds fedjax-lora[tpu] and this folder.
set -euo pipefail
config=$1 out=$2
shift 2
exec xpk workload create \
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="fedjax-lora-${USER:-run}" \
  --tpu-type="${TPU_TYPE:-v5litepod-8}" --num-slices=1 \
  --docker-image="$IMAGE" --max-restarts=10 \
  --command="bash launch/host.sh $config $out" "$@"
