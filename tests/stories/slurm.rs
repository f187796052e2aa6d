//! The batch script for Slurm, run with stand-ins for Slurm's own commands: one starts the tasks on this machine, the other says what it is told.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use peapod_tests::harness::{Cluster, Process, Signal, kill, program};
use rustix::process::{Pid, kill_process_group};

const SRUN: &str = r#"#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & done
wait
"#;
const SCONTROL: &str = "#!/bin/bash\necho \"scontrol $*\"\n";

/// Ends whatever a session still runs when its story fails.
struct Session(u32);

impl Drop for Session {
    fn drop(&mut self) {
        let leader = i32::try_from(self.0).ok().and_then(Pid::from_raw);
        // Nothing is left of one that went well.
        let _ = leader.map(|leader| kill_process_group(leader, Signal::KILL));
    }
}

fn tool(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn slurm_script_starts_a_dead_worker_again_and_is_queued_again_before_its_time_is_up() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000).set("checkpoint.every_steps", 2);
    let folder = cluster.folder();
    let (job, state) = (folder.join("job.toml"), cluster.state_dir());
    std::fs::write(&job, cluster.job.to_string()).unwrap();
    tool(folder, "srun", SRUN);
    tool(folder, "scontrol", SCONTROL);
    let programs = program("coordinator");
    let variables = [
        format!("PATH={}:{}", folder.display(), std::env::var("PATH").unwrap()),
        format!("PEAPOD_BIN={}", programs.parent().unwrap().display()),
        format!("PEAPOD_STATE_DIR={}", state.display()),
        format!("PEAPOD_JOB={}", job.display()),
        "PEAPOD_DEVICE=cpu".into(),
        "SLURM_NTASKS=2".into(),
        // The port comes of it.
        format!("SLURM_JOB_ID={}", std::process::id()),
    ];
    let arguments = ["env"].into_iter().chain(variables.iter().map(String::as_str)).chain(["bash", "deploy/slurm/peapod.sbatch"]);
    let mut script = Process::start("script", "/usr/bin/setsid", &arguments.collect::<Vec<_>>());
    let _session = Session(script.id());

    script.wait_for("checkpoint of step 2 stored");
    let joined = script.wait_for("rank 1 (pid ");
    let (_, pid) = joined.split_once("(pid ").unwrap();
    script.allow_error(" lost at step ");
    kill(pid.split_once(' ').unwrap().0.parse().unwrap());
    script.wait_for("rank 1: ended with 137, start 1");
    script.wait_for_times(": 2 workers train from", 2);

    script.signal(Signal::USR1);
    script.expect_exit(0);
    script.assert_said(&format!("scontrol requeue {}", std::process::id()));
    assert!(cluster.newest_checkpoint().step >= 2);
    let token = std::fs::read_to_string(state.join("token")).unwrap();
    assert!(script.lines_with(&token).is_empty(), "the log of a batch job is no place for a secret");
}
