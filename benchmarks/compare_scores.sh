#!/usr/bin/env bash
# Compare scores on the demo's tasks: experts alone, merged by overlap, merged uniformly; docs/results.md shows the outcome.
#
#   benchmarks/compare_scores.sh OUT
#
# "dense" trains all query, key and value entries. Takes about 20 minutes on two cores; what is there already is kept.
set -euo pipefail
out=$1
tasks="number_words animal_class table_order"
mkdir -p "$out"
train() { # score task flags…
    [ -d "$out/$1/$2" ] || sparselet train --task "builtin:$2" --out "$out/$1/$2" \
        --learning-rate 1e-3 --epochs 2 --batch-size 8 --no-chat-template --json "${@:3}"
}
for score in mcs mcs_neg gm random dense; do
    for task in $tasks; do
        if [ "$score" = dense ]; then train dense "$task" --density 1; else train "$score" "$task" --when paper --score "$score"; fi
    done
    own=$(for task in $tasks; do echo "$out/$score/$task"; done)
    for method in overlap uniform; do
        [ -d "$out/$score/$method" ] || sparselet merge $own --method $method --out "$out/$score/$method"
    done
    [ -f "$out/$score.json" ] || sparselet eval --task $(for task in $tasks; do echo "builtin:$task"; done) \
        --adapter $own "$out/$score/overlap" "$out/$score/uniform" --max-new-tokens 24 --json > "$out/$score.json"
done
python - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
found = {score: json.loads((out / f"{score}.json").read_text()) for score in ("mcs", "mcs_neg", "gm", "random", "dense")}
rows = {}
for score, models in found.items():
    by = {pathlib.Path(name).name: {t: r["rougeL"] for t, r in tasks.items()} for name, tasks in models.items()}
    rows[f"{score}: alone"] = {task: by[task][task] for task in by["overlap"]}
    rows[f"{score}: merged by overlap"] = by["overlap"]
    rows[f"{score}: merged uniformly"] = by["uniform"]
print(json.dumps(rows, indent=2))
PY
