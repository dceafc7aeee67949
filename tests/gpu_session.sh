#!/bin/sh
# What a machine with an NVIDIA GPU measures, with python3, numpy, torch and transformers alone.
#
#   sh gpu_session.sh PLACE OUT [STEP...]      PLACE has what `make pack-cuda` wrote, OUT gets results
#
# Steps, by default all: checks (3 min), eager (2 min), tune (TUNE_SECONDS a round, 4 min), compiled (8 min).
set -u
place=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- checks eager tune compiled
work=$(mktemp -d)
mkdir -p "$out"
status=0

unpack() {  # NAME
    [ -d "$work/$1" ] || { mkdir "$work/$1" && python3 -m tarfile -e "$place/$1.tar.xz" "$work/$1"; }
}

bench() {  # RESULT WORDS...
    unpack bench
    result=$1
    shift
    python3 "$work/bench/cuda_bench.py" --fp16 "$work/bench/fp16" --int8 "$work/bench/int8" \
        --model "$work/bench/model" -o "$out/$result" "$@"
}

nvidia-smi || exit 3
for step; do
    began=$(date +%s)
    case $step in
    checks) unpack checks && python3 "$work/checks/cuda_checks.py" "$work/checks" ;;
    eager) bench eager.json --no-compile ;;
    compiled) bench compiled.json ;;
    tune)
        for round in "$place"/round*.pyz; do
            python3 "$round" --rates
            python3 "$round" --output "$out/$(basename "$round" .pyz).jsonl" \
                --seconds "${TUNE_SECONDS:-240}"
        done
        ;;
    *) echo "there is no step $step" >&2 && false ;;
    esac || status=1
    echo "$step: $(($(date +%s) - began)) s, so far $([ $status = 0 ] && echo well || echo failed)"
done
rm -r "$work"
exit $status
