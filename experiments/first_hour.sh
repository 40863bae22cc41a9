#!/usr/bin/env bash
# The first hour on a new GPU: tests, benchmarks, a slice of ListOps at full size. Each part takes less than
# nine minutes, so that a machine that is lent for ten at a time can run them one by one:
#
#   experiments/first_hour.sh OUT              all parts
#   experiments/first_hour.sh OUT bench-train  one of them
#   DRY=1 experiments/first_hour.sh OUT        the same, smallest sizes, on a CPU: whether every command still runs
#
# OUT gets JSON that names the card, and the run's folder, which the next slice goes on from.
set -uo pipefail
out=${1:?expected a folder for the results}
only=${2:-}
mkdir -p "$out"
card=$(python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")')
if [ -n "${DRY:-}" ]; then
  bench="quick=true" slice="preset=tiny trainer.max_steps=2 trainer.accelerator=cpu trainer.progress=plain" tests="tests/ops --collect-only"
else
  bench="" slice="preset=full trainer.max_time=8m" tests="tests -m gpu"
  [ "$card" = cpu ] && { echo "expected a GPU, found none; DRY=1 tries the commands without one" >&2; exit 2; }
fi

part() {  # part NAME COMMAND…: run it, and write what came of it
  local name=$1 began=$SECONDS status=0
  shift
  [ -n "$only" ] && [ "$only" != "$name" ] && return
  timeout 540 "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '{"part": "%s", "card": "%s", "status": %d, "seconds": %d}\n' "$name" "$card" "$status" $((SECONDS - began)) |
    tee "$out/$name.status.json"
  failed=$((failed + (status != 0)))
}

failed=0
# shellcheck disable=SC2086  # several words each
{
  part tests python -m pytest -n 0 -q $tests -p no:cacheprovider
  part bench-tune ${DRY:+env TRITON_INTERPRET=1} python -m experiments.bench tune $bench out="$out/tune.json"
  for name in linear_attention convolution layers generate; do
    part "bench-$name" python -m experiments.bench "$name" $bench out="$out/$name.json"
  done
  part bench-train python -m experiments.bench train $bench task=listops,image preset="$([ -n "$bench" ] && echo tiny || echo full)" out="$out/train.json"
  part listops-full python -m chela.train task=listops model=chela $slice runs="$out/runs" data.dir="$out/data" resume=auto
}
exit $((failed > 0))
