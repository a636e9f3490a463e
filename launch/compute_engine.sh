#!/usr/bin/env bash
# A TPU slice of Compute Engine: machines of one topology policy in a managed group.
#   PROJECT=... ZONE=us-west4-a IMAGE=... bash launch/compute_engine.sh CONFIG.yaml DIR
# TOPOLOGY is 4x4, MACHINE ct5lp-hightpu-4t and HOSTS 4 if not given: chips of the topology over chips of a machine.
set -euo pipefail
config=$1 out=$2
name=fedjax-lora region=${ZONE%-*} hosts=${HOSTS:-4}
common=(--project="$PROJECT" --quiet)
gcloud compute resource-policies create workload-policy "$name" "${common[@]}" \
  --region="$region" --type=HIGH_THROUGHPUT --accelerator-topology="${TOPOLOGY:-4x4}"
gcloud compute instance-templates create "$name" "${common[@]}" \
  --machine-type="${MACHINE:-ct5lp-hightpu-4t}" --image="$IMAGE" --maintenance-policy=TERMINATE
gcloud compute instance-groups managed create "$name" "${common[@]}" \
  --zone="$ZONE" --size="$hosts" --template="$name" \
  --workload-policy="projects/$PROJECT/regions/$region/resourcePolicies/$name"
gcloud compute instance-groups managed wait-until "$name" "${common[@]}" --zone="$ZONE" --stable
mapfile -t machines < <(gcloud compute instance-groups managed list-instances "$name" "${common[@]}" \
  --zone="$ZONE" --format="value(instance.basename())")
for number in "${!machines[@]}"; do
  told="JAX_COORDINATOR_ADDRESS=${machines[0]}:8476 JAX_NUM_PROCESSES=${#machines[@]} JAX_PROCESS_ID=$number"
  gcloud compute ssh "${machines[$number]}" "${common[@]}" --zone="$ZONE" \
    --command="$told bash launch/host.sh $config $out" &
done
wait
