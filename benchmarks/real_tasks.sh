#!/usr/bin/env bash
# Train, merge and measure experts on three real tasks; docs/results.md shows the outcome.
#
#   benchmarks/real_tasks.sh TASKS OUT     TASKS holds the directories sst2, e2e_nlg and num_to_words
#
# Takes about an hour on two cores. Experts that are there already are not trained again.
set -euo pipefail
tasks=$1 out=$2
names="num_to_words sst2 e2e_nlg"
common="--train-rows 300 --validation-rows 100 --epochs 2 --batch-size 8 --no-chat-template --json --when paper --score mcs_neg"

train() { # name learning-rate flags…
    local path="$out/$1-$2-$3"
    [ -d "$path" ] || sparselet train --task "$tasks/$1" --out "$path" --learning-rate "$2" ${*:4} $common
}

# The learning rate is chosen on the validation loss of element-sparse experts.
for rate in 1e-3 2e-3 4e-3; do
    for name in $names; do train "$name" "$rate" element; done
done
rate=$(python - "$out" $names <<'PY'
import json, pathlib, sys
out, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
loss = {}
for rate in ("1e-3", "2e-3", "4e-3"):
    found = [json.loads((out / f"{n}-{rate}-element/adapter_config.json").read_text())["metrics"]["validation_loss"] for n in names]
    print(rate, dict(zip(names, found)), file=sys.stderr)
    loss[rate] = sum(found) / len(found)
print(min(loss, key=loss.get))
PY
)
echo "learning rate $rate"

for name in $names; do train "$name" "$rate" block --block-size 16; done
experts=""
for kind in element block; do
    own=""
    for name in $names; do own="$own $out/$name-$rate-$kind"; done
    [ -d "$out/merged-$kind" ] || sparselet merge $own --method overlap --out "$out/merged-$kind"
    [ -d "$out/uniform-$kind" ] || sparselet merge $own --method uniform --out "$out/uniform-$kind"
    experts="$experts $own $out/merged-$kind $out/uniform-$kind"
done
sparselet eval --task $(for name in $names; do echo "$tasks/$name"; done) \
    --adapter $experts --base --rows 100 --no-chat-template --json > "$out/scores.json"
