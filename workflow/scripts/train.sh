#!/usr/bin/env bash
# train.sh OUT KEY EXPERIMENT [mango train's arguments]: train into OUT, continuing what an attempt that was cut off left there.
# The key says which code and settings: it lies in OUT/unfinished while a run is under way, and a checkpoint is continued only under the
# key that began it. Anything else in OUT is of an older version and is replaced.
set -euo pipefail
out=$1 key=$2
shift 2

if [ "$(cat "$out/unfinished" 2>/dev/null)" = "$key" ]; then
    start=--resume
else
    start=--force
    mkdir -p "$out"
    echo "$key" >"$out/unfinished"
fi
python -m mango.cli train "$@" --out "$out" "$start"
rm "$out/unfinished"
