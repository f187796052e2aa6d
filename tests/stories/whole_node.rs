//! The script that starts the workers of a whole node in one pod, with a stand-in for the worker: each start of a rank ends as its list
//! says.

use std::os::unix::fs::PermissionsExt;

use peapod_tests::harness::{Process, Signal};
use tempfile::TempDir;

const WORKER: &str = r#"#!/bin/bash
echo "rank $PEAPOD_RANK starts: $*"
list=$LISTS/$PEAPOD_RANK
code=$(head -n 1 "$list")
sed -i 1d "$list"
[ "$code" = waits ] || exit "$code"
trap 'echo "rank $PEAPOD_RANK leaves"; exit 143' TERM
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"#;

/// A pod with two GPUs, the fifth of its Job: ranks 8 and 9.
struct Pod {
    script: Process,
    _folder: TempDir,
}

impl Pod {
    /// How each start of each of its workers ends: with a code, or it waits until it is told to leave.
    fn start(lists: [&[&str]; 2]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let worker = folder.path().join("worker");
        std::fs::write(&worker, WORKER).unwrap();
        std::fs::set_permissions(&worker, std::fs::Permissions::from_mode(0o755)).unwrap();
        for (rank, list) in (8..).zip(lists) {
            std::fs::write(folder.path().join(format!("{rank}")), list.join("\n")).unwrap();
        }
        let environment = [
            ("PATH", format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap())),
            ("LISTS", folder.path().display().to_string()),
            ("JOB_COMPLETION_INDEX", "4".to_owned()),
            ("NUM_GPUS", "2".to_owned()),
        ];
        let arguments = ["bash", "deploy/kubernetes/components/whole-node/workers.sh", "--connect-timeout=10m"];
        Self { script: Process::start_with("workers.sh", "/usr/bin/env", &arguments, &environment), _folder: folder }
    }

    fn num_starts(&self, rank: u32) -> usize {
        self.script.lines_with(&format!("rank {rank} starts: --device cuda:{} --connect-timeout=10m", rank - 8)).len()
    }
}

#[test]
fn worker_of_a_whole_node_is_started_again_in_place() {
    // Away coordinators are no failures: more of them than failures are allowed.
    let mut pod = Pod::start([&["1", "75", "75", "75", "137", "0"], &["0"]]);
    pod.script.expect_exit(0);
    assert_eq!((pod.num_starts(8), pod.num_starts(9)), (6, 1));
}

#[test]
fn pod_of_a_whole_node_ends_with_the_code_of_a_worker_that_fails_for_good() {
    for (list, code, num_starts) in [(&["2"][..], 2, 1), (&["1", "1", "139"], 139, 3)] {
        let mut pod = Pod::start([list, &["waits"]]);
        pod.script.expect_exit(code);
        assert_eq!((pod.num_starts(8), pod.num_starts(9)), (num_starts, 1));
        pod.script.assert_said("rank 9 leaves");
    }
}

#[test]
fn workers_of_a_whole_node_leave_when_their_pod_is_deleted() {
    let mut pod = Pod::start([&["waits"], &["waits"]]);
    pod.script.wait_for("rank 8 starts");
    pod.script.wait_for("rank 9 starts");
    pod.script.signal(Signal::TERM);
    pod.script.expect_exit(143);
    assert_eq!((pod.num_starts(8), pod.num_starts(9)), (1, 1));
}
