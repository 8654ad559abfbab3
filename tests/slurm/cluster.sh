#!/usr/bin/env bash
# A real Slurm cluster of two nodes, n1 and n2, on one machine, for tests. Debian's packages are enough.
#   tests/slurm/cluster.sh install   # apt-get, as root; does nothing where Slurm is there already
#   tests/slurm/cluster.sh start     # does nothing where it runs already; well under a second
#   tests/slurm/cluster.sh stop      # ends it and removes its folder
# Everything it writes lies in SLURM_TEST_DIR, by default /tmp/qlora-dist-slurm-UID, where the tests look for it.
# `export SLURM_CONF=/tmp/qlora-dist-slurm-$(id -u)/slurm.conf` makes sinfo, srun and sbatch talk to it.
# It has its own ports and its own munge key and socket: a cluster that this machine belongs to is left alone.
set -euo pipefail

dir=${SLURM_TEST_DIR:-/tmp/qlora-dist-slurm-$(id -u)}
port=${SLURM_TEST_PORT:-26817} # slurmctld; the nodes take the next two
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin # slurmctld, slurmd and munged; not in everybody's PATH

main() {
  case ${1-} in
    install | start | stop) "$1" ;;
    *) fail "usage: tests/slurm/cluster.sh install|start|stop" ;;
  esac
}

fail() {
  echo "error: $*" >&2
  exit 1
}

install() {
  if has_slurm; then return; fi
  [[ $(id -u) == 0 ]] || fail "Slurm is not installed. As root: apt-get install slurm-wlm munge"
  command -v apt-get >/dev/null || fail "Slurm is not installed, and there is no apt-get to install it with."
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  apt-get -qq install --no-install-recommends slurm-wlm munge >/dev/null
}

has_slurm() {
  local program
  for program in munged slurmctld slurmd sinfo; do command -v $program >/dev/null || return; done
}

start() {
  has_slurm || fail "Slurm is not installed. As root: tests/slurm/cluster.sh install"
  if both_nodes_respond; then return; fi
  stop
  mkdir -p "$dir"/{state,n1,n2,munge}
  chmod 755 "$dir" "$dir/munge" # munged refuses folders that others may write to
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
  write_config
  munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  slurmctld -c
  slurmd -N n1
  slurmd -N n2
  local attempt
  for attempt in {1..150}; do
    if both_nodes_respond; then return; fi
    sleep 0.2
  done
  tail -n 20 "$dir"/*.log >&2
  fail "the nodes did not come up within $((attempt / 5)) s. The logs above, in $dir, say why."
}

both_nodes_respond() {
  [[ -e $SLURM_CONF ]] && [[ $(timeout 5 sinfo -h -r -N -t idle,alloc,mix,comp -o %N 2>/dev/null | wc -l) == 2 ]]
}

stop() {
  local file pid
  for file in "$dir"/{n1/pid,n2/pid,slurmctld.pid,munge/pid}; do
    [[ -s $file ]] || continue
    pid=$(<"$file")
    # after a restart of the machine the number may belong to something else
    [[ -e /proc/$pid && $(<"/proc/$pid/comm") =~ ^(munged|slurmctld|slurmd)$ ]] || continue
    kill "$pid"
    for _ in {1..100}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  done
  rm -rf "$dir"
}

write_config() {
  local user cpus
  user=$(id -un)
  cpus=$(nproc)
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
# cred_expire is also how long a requeued job waits before it starts again: 120 s unless set
AuthInfo=socket=$dir/munge/socket,cred_expire=5
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/%n/pid
SlurmdLogFile=$dir/%n.log
SlurmdSpoolDir=$dir/%n/spool
StateSaveLocation=$dir/state
# no cgroups, no binding, and both nodes may claim the same processors
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cpus
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cpus
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE
CONF
}

main "$@"
