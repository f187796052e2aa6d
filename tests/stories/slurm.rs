//! The batch script for Slurm, run with stand-ins for Slurm's own commands: one starts the tasks on this machine, the other says what it is
//! told.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use peapod_tests::harness::{Cluster, Process, Signal, demo_samples, is_alive, kill, program, tar_of};
use rustix::process::{Pid, kill_process, kill_process_group};

const SRUN: &str = r#"#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & tasks+=($!); done
# As with Slurm's own, its tasks end with it, and all that they have started.
trap 'for task in "${tasks[@]}"; do kill -KILL "$task" $(cat "/proc/$task/task/$task/children"); done 2>/dev/null' TERM
wait
"#;
const SCONTROL: &str = "#!/bin/bash\necho \"scontrol $*\"\n";

/// A batch job of two tasks.
struct Batch {
    script: Process,
    id: u32,
}

impl Drop for Batch {
    /// Ends whatever it still runs when its story fails.
    fn drop(&mut self) {
        // Nothing is left of one that went well.
        let _ = kill_process_group(pid(self.script.id()), Signal::KILL);
    }
}

impl Batch {
    /// Submits the cluster's job as the number `job` of this process.
    fn submit(cluster: &Cluster, job: u32) -> Self {
        let folder = cluster.folder();
        let (job_file, state) = (folder.join("job.toml"), cluster.state_dir());
        std::fs::write(&job_file, cluster.job.to_string()).unwrap();
        tool(folder, "srun", SRUN);
        tool(folder, "scontrol", SCONTROL);
        let programs = program("coordinator");
        let id = std::process::id() * 10 + job;
        let variables = [
            format!("PATH={}:{}", folder.display(), std::env::var("PATH").unwrap()),
            format!("PEAPOD_BIN={}", programs.parent().unwrap().display()),
            format!("PEAPOD_STATE_DIR={}", state.display()),
            format!("PEAPOD_JOB={}", job_file.display()),
            "PEAPOD_DEVICE=cpu".into(),
            "PEAPOD_STOP_WITHIN=6".into(),
            "PEAPOD_GRACE=3".into(),
            "SLURM_NTASKS=2".into(),
            format!("SLURM_JOB_ID={id}"),
        ];
        let arguments = ["env"].into_iter().chain(variables.iter().map(String::as_str)).chain(["bash", "deploy/slurm/peapod.sbatch"]);
        let mut script = Process::start("script", "/usr/bin/setsid", &arguments.collect::<Vec<_>>());
        // Then it tries another.
        script.allow_error("cannot listen on ");
        Self { script, id }
    }

    /// The process id of the worker that joined first under a rank.
    fn pid_of_rank(&self, rank: u32) -> u32 {
        let start = format!("rank {rank} (pid ");
        let joined = self.script.wait_for(&start);
        let (_, rest) = joined.split_once(&start).unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    }

    fn is_queued_again(&self) -> bool {
        !self.script.lines_with(&format!("scontrol requeue {}", self.id)).is_empty()
    }
}

fn pid(id: u32) -> Pid {
    i32::try_from(id).ok().and_then(Pid::from_raw).unwrap()
}

fn signal(id: u32, signal: Signal) {
    kill_process(pid(id), signal).unwrap();
}

/// Who started a process.
fn parent_of(id: u32) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(1).unwrap().parse().unwrap()
}

fn tool(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A job without an end, with a checkpoint every other step.
fn endless() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000).set("checkpoint.every_steps", 2);
    cluster
}

#[test]
fn slurm_script_starts_a_dead_worker_again_and_is_queued_again_before_its_time_is_up() {
    let cluster = endless();
    // Somebody else has the port that the job's number comes to.
    let id = std::process::id() * 10;
    let taken = u16::try_from(20_000 + id % 12_000).unwrap();
    let _somebody = TcpListener::bind(("0.0.0.0", taken));
    let mut batch = Batch::submit(&cluster, 0);
    batch.script.wait_for(&format!("cannot listen on 0.0.0.0:{taken}"));

    batch.script.wait_for("checkpoint of step 2 stored");
    batch.script.allow_error(" lost at step ");
    kill(batch.pid_of_rank(1));
    batch.script.wait_for("rank 1: ended with 137, start 1");
    batch.script.wait_for_times(": 2 workers train from", 2);

    batch.script.signal(Signal::USR1);
    batch.script.expect_exit(0);
    assert!(batch.is_queued_again());
    assert!(cluster.newest_checkpoint().step >= 2);
    let token = std::fs::read_to_string(cluster.state_dir().join("token")).unwrap();
    assert!(batch.script.lines_with(&token).is_empty(), "the log of a batch job is no place for a secret");
}

#[test]
fn slurm_script_is_queued_again_without_a_worker_that_is_away() {
    let cluster = endless();
    let mut batch = Batch::submit(&cluster, 1);
    batch.script.wait_for("checkpoint of step 2 stored");
    let away = batch.pid_of_rank(1);
    batch.script.allow_error(" lost at step ");
    signal(away, Signal::STOP);
    batch.script.wait_for(": 1 worker trains from");

    batch.script.signal(Signal::USR1);
    batch.script.expect_exit(0);
    assert!(batch.is_queued_again());
    batch.script.assert_said("tasks are still there 3 s after the coordinator's end");
    assert!(!is_alive(away));
}

#[test]
fn slurm_job_that_does_not_stop_in_time_goes_on_when_it_is_queued_again() {
    let cluster = endless();
    let mut batch = Batch::submit(&cluster, 4);
    batch.script.wait_for("checkpoint of step 2 stored");
    // Nobody gets to the step after which all would meet.
    for rank in 0..2 {
        signal(batch.pid_of_rank(rank), Signal::STOP);
    }
    batch.script.signal(Signal::USR1);
    batch.script.expect_exit(0);
    assert!(batch.is_queued_again());
    drop(batch);

    let step = cluster.newest_checkpoint().step;
    let mut batch = Batch::submit(&cluster, 4);
    batch.script.wait_for(&format!(": 2 workers train from step {step}"));
    batch.script.signal(Signal::USR1);
    batch.script.expect_exit(0);
    assert!(batch.is_queued_again());
}

#[test]
fn slurm_script_of_a_failed_job_keeps_no_worker() {
    let mut cluster = Cluster::new();
    let mut samples = demo_samples(64);
    for sample in &mut samples {
        sample.json = b"not json".to_vec();
    }
    cluster.deal_tars(&[tar_of(&samples)]);
    let mut batch = Batch::submit(&cluster, 2);
    // A worker that ended with the job is started again before it is known that nobody is there to look for.
    batch.script.wait_for(": ended with 1, start 1");
    batch.script.expect_exit(1);
    batch.script.assert_said("samples are broken");
    assert!(!batch.is_queued_again());
    assert!(batch.script.lines_with("start 2").is_empty(), "a worker looked for a coordinator that is gone for good");
}

#[test]
fn slurm_job_that_is_cancelled_leaves_its_newest_step_and_starts_nothing_again() {
    let cluster = endless();
    let mut batch = Batch::submit(&cluster, 3);
    batch.script.wait_for("checkpoint of step 2 stored");
    let workers = [0, 1].map(|rank| batch.pid_of_rank(rank));
    // Slurm tells the batch script and each task, and nobody whom they have started.
    workers.iter().for_each(|&worker| signal(parent_of(worker), Signal::TERM));
    batch.script.signal(Signal::TERM);
    batch.script.expect_exit(143);
    assert!(!batch.is_queued_again());
    assert!(batch.script.lines_with(": ended with ").is_empty(), "a worker was started again");
    assert!(workers.iter().all(|&worker| !is_alive(worker)));
    let newest = cluster.steps().last().unwrap().step;
    assert_eq!(cluster.newest_checkpoint().step, newest);
}
