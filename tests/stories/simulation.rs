//! Clusters in virtual time: each seed is a job with its faults, and each must end with every sample of every epoch in its weights once.

use std::time::Instant;

use peapod_tests::simulation::{ELASTIC, Summary, run, trace};

/// Seeds that have found something; each would again, were it undone.
///
/// A seed means another story once the plan of seeds or the order of events has changed: what each found is a table of its own too, in
/// `coordinator/src/core/tests/found.rs`.
const FOUND: &[&[u64]] = &[
    // A member that had brought enough to read kept the others waiting for its first shard for ever.
    &[303, 742, 2116],
    // A copy of an earlier step, refused late, counted as a failure of the last checkpoint.
    &[76, 1276],
    // The ledger went back to a checkpoint and the journal did not.
    &[593, 1187],
    // The end of a shard was seen only by a worker that died before it could say so.
    &[976, 1129],
    // A return that ended the job was written down after the end.
    &[447],
    // The only holder of the weights left while a generation was formed, or a newcomer while it was broken up.
    &[3885, 7359],
    // A lease granted right behind an assignment was taken for a lost one.
    &[3130, 5791],
    // Who was away while others began anew took a share that had not counted for trained.
    &[1114, 6148, 9238],
    // A drain was forgotten while members came back; a farewell whose copy had been refused was not asked for again.
    &[8874, 5788],
];

/// Runs seeds and says what they came to.
///
/// # Panics
/// With the first failures, if there are any.
#[track_caller]
fn assert_seeds_hold(seeds: impl IntoIterator<Item = u64>) {
    let started = Instant::now();
    let mut sum = Summary::default();
    let mut failures = Vec::new();
    let mut num_seeds = 0;
    for seed in seeds {
        num_seeds += 1;
        match run(seed) {
            Ok(summary) => {
                sum.events += summary.events;
                sum.took += summary.took;
                sum.faults += summary.faults;
                sum.terms += summary.terms;
                sum.processes += summary.processes;
                sum.rollbacks += summary.rollbacks;
                sum.failures += summary.failures;
            }
            Err(failure) => failures.push(failure),
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{num_seeds} seeds in {seconds:.2} s ({:.2} ms a seed), together {sum:?}", seconds * 1000.0 / f64::from(num_seeds));
    let first: Vec<&str> = failures.iter().take(3).map(String::as_str).collect();
    assert!(failures.is_empty(), "{} of {num_seeds} seeds failed:\n{}", failures.len(), first.join("\n\n"));
}

#[test]
fn clusters_of_many_seeds_lose_and_double_no_sample() {
    if let Ok(seed) = std::env::var("PEAPOD_SIM_SEED") {
        let seed = seed.parse().expect("PEAPOD_SIM_SEED is a number");
        println!("{}", trace(seed).join("\n"));
        return assert_seeds_hold([seed]);
    }
    assert_seeds_hold((0..300).chain(ELASTIC..ELASTIC + 300));
}

#[test]
fn seeds_that_have_found_something_find_it_no_more() {
    assert_seeds_hold(FOUND.concat());
}

#[test]
#[ignore = "takes a while; `make test-all` runs it"]
fn clusters_of_twenty_thousand_seeds_lose_and_double_no_sample() {
    assert_seeds_hold((0..10_000).chain(ELASTIC..ELASTIC + 10_000));
}
