#!/usr/bin/env bash
# Starts a worker for each GPU of a pod, with these arguments. Ends with what the pod's Job is to act on: 0 if all did, else with the code of
# the first one that is not to be started again in place; the others then leave after the step in flight.
set -u
first_rank=$((JOB_COMPLETION_INDEX * NUM_GPUS))

# One worker, started again in place: the others keep their models and train on.
keep() { # GPU ARGUMENT...
  local gpu=$1 failures=0 told='' worker='' code
  shift
  export PEAPOD_RANK=$((first_rank + gpu))
  # Told, it leaves after the step in flight, and is not started again.
  trap 'told=yes; kill -TERM $worker 2>/dev/null' TERM
  while :; do
    worker --device "cuda:$gpu" "$@" &
    worker=$!
    # Told when there was no worker yet.
    [ -z "$told" ] || kill -TERM $worker 2>/dev/null
    code=0
    wait $worker || code=$?
    if [ -n "$told" ]; then
      # The signal cut that wait short.
      wait $worker
      exit
    fi
    case $code in
    # The job has ended, or arguments, job file, token or certificate are wrong.
    0 | 2) exit $code ;;
    # The coordinator is away or was started anew, or somebody stopped this worker alone.
    75 | 143) ;;
    # It failed or was killed. What does not pass here may pass in a new pod.
    *) ((++failures < 3)) || exit $code ;;
    esac
    echo "rank $PEAPOD_RANK: ended with $code, started again" >&2
    sleep 1
    [ -z "$told" ] || exit 143
  done
}

keepers=()
for ((gpu = 0; gpu < NUM_GPUS; gpu++)); do
  keep "$gpu" "$@" &
  keepers+=($!)
done

# Once: a second SIGTERM would make workers leave at once.
leaving=
leave() {
  [ -z "$leaving" ] || return
  leaving=yes
  kill -TERM "${keepers[@]}" 2>/dev/null
}
trap leave TERM

code=0
while ((${#keepers[@]} > 0)); do
  sleep 1
  alive=()
  for keeper in "${keepers[@]}"; do
    if kill -0 "$keeper" 2>/dev/null; then
      alive+=("$keeper")
      continue
    fi
    this=0
    wait "$keeper" || this=$?
    [ $code != 0 ] || code=$this
  done
  keepers=("${alive[@]+"${alive[@]}"}")
  [ $code = 0 ] || leave
done
exit $code
