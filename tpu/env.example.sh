# shellcheck shell=bash
# Variables of the scripts in this directory. Copy it, fill it in, and source it:  cp tpu/env.example.sh env.sh; . ./env.sh

export NAME=opd              # of the slice and of its queued resource
export ZONE=us-central1-a    # a zone with this generation: gcloud compute tpus accelerator-types list --zone=ZONE
export TOPOLOGY=v5e-8        # generation and size; python3 tpu/topology.py lists them
export SPOT=1                # cheaper, but may be preempted at any time: babysit.sh. Empty: on demand
export VALID_UNTIL=6h        # a request that is not granted by then becomes FAILED
# export PROJECT=my-project  # if it is not gcloud's default

# For babysit.sh:
export POLL=60               # seconds between checks
export MAX_SLICES=20         # give up after this many slices
export MAX_STARTS=50         # give up after this many starts of the run
export MAX_FAILURES=20       # give up after this many failures in a row
export FILES=                # data files that setup_vm.sh copies to every worker, separated by blanks
export DELETE=1              # delete the slice when the run has finished. Empty: it costs until delete.sh
