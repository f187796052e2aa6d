//! The loader with real threads and small tars. Nothing here waits for a time: every wait is for an event or a share.

mod cached;
mod shared_shard;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::*;
use crate::sample::{Reason, Rule};
use crate::testing::http::{Fault, FileServer, Habits};
use crate::testing::{data_section, jpeg_of, noisy_jpeg, tar_of};

/// Long enough for a loaded machine; only a failing test waits it out.
const PATIENCE: Duration = Duration::from_secs(60);

/// A sample to write into a tar.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Good,
    /// Of another bucket.
    Wide,
    Filtered,
    NoJson,
    /// The header is whole, the picture is not.
    BreaksOff,
}

fn members(kinds: &[Kind]) -> Vec<(String, Vec<u8>)> {
    let mut members = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let jpg = match kind {
            Kind::Wide => jpeg_of(64, 32, [index as u8, 0, 0]),
            Kind::BreaksOff => {
                let jpeg = noisy_jpeg(32, 32, index as u64);
                jpeg[..jpeg.len() * 3 / 4].to_vec()
            }
            _ => jpeg_of(40, 36, [index as u8, 0, 0]),
        };
        members.push((format!("{index:04}.jpg"), jpg));
        match kind {
            Kind::NoJson => {}
            Kind::Filtered => members.push((format!("{index:04}.json"), br#"{"caption_zh": "x"}"#.to_vec())),
            _ => {
                members.push((format!("{index:04}.json"), format!(r#"{{"caption_zh": "{index}", "caption_en": "{index}"}}"#).into_bytes()))
            }
        }
    }
    members
}

fn write_shard(folder: &Path, shard: u32, kinds: &[Kind]) -> String {
    let members = members(kinds);
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let path = folder.join(format!("{shard:05}.tar"));
    std::fs::write(&path, tar_of(&members)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn lease(number: u32, epoch: u32, url: &str) -> LeasedShard {
    LeasedShard {
        lease: LeaseId(u64::from(number) + 100),
        epoch: Epoch(epoch),
        shard: ShardId(number),
        url: url.to_owned(),
        done: Bitmap::default(),
        end: None,
    }
}

/// Two small buckets, batches of 4.
fn config(shuffle_buffer: u32, decode_threads: u32) -> LoaderConfig {
    let mut data = data_section();
    data.buckets = vec![[16, 16], [32, 16]];
    data.shuffle_buffer = shuffle_buffer;
    data.decode_threads = decode_threads;
    LoaderConfig::new(data, 7, 4, 0.1)
}

struct Rig {
    loader: Loader,
    handle: LoaderHandle,
    events: Receiver<LoaderEvent>,
}

impl Rig {
    fn start(config: LoaderConfig) -> Self {
        let (sender, events) = channel();
        let loader = Loader::start(config, move |event| drop(sender.send(event))).unwrap();
        Self { handle: loader.handle(), loader, events }
    }

    /// Shares of `num_samples` until one is empty.
    fn drain(&mut self, num_samples: usize) -> Vec<Share> {
        std::iter::from_fn(|| Some(self.loader.next_share(num_samples).unwrap()).filter(|share| share.num_samples() > 0)).collect()
    }

    /// Everything reported of a lease, up to its end.
    fn reports(&self, lease: LeaseId) -> (Vec<Skip>, ShardEnd) {
        let mut all = Vec::new();
        loop {
            if let LoaderEvent::Shard { lease: of, skipped, end } = self.events.recv_timeout(PATIENCE).unwrap()
                && of == lease
            {
                all.extend(skipped);
                if let Some(end) = end {
                    return (all, end);
                }
            }
        }
    }

    fn all_skips(self) -> Vec<Skip> {
        drop((self.loader, self.handle));
        let shard_skips = |event| if let LoaderEvent::Shard { skipped, .. } = event { skipped } else { Vec::new() };
        self.events.into_iter().flat_map(shard_skips).collect()
    }
}

fn names(shares: &[Share]) -> Vec<SampleName> {
    shares.iter().flat_map(Share::names).collect()
}

fn mixed(num: usize) -> Vec<Kind> {
    let pattern = [Kind::Good, Kind::Wide, Kind::Good, Kind::Filtered, Kind::Good, Kind::BreaksOff, Kind::Wide, Kind::NoJson];
    pattern.into_iter().cycle().take(num).collect()
}

#[test]
fn every_index_is_handed_out_or_reported_exactly_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(10, 2));
    let leases: Vec<_> = (0..3).map(|shard| lease(shard, 0, &write_shard(folder.path(), shard, &mixed(40)))).collect();
    rig.handle.grant(leases, true);
    let shares = rig.drain(6);
    let mut fates: BTreeMap<u32, u32> = BTreeMap::new();
    for name in names(&shares) {
        *fates.entry(name.index).or_default() += 1;
    }
    let skips = rig.all_skips();
    for skip in &skips {
        *fates.entry(skip.index).or_default() += 1;
    }
    assert_eq!(fates, (0..40).map(|index| (index, 3)).collect(), "three shards of 40");
    let of = |reason| skips.iter().filter(|skip| skip.rule.reason() == reason).count();
    assert_eq!((of(Reason::Filtered), of(Reason::Bad)), (15, 30));
    assert!(skips.iter().filter(|skip| skip.index % 8 == 5).all(|skip| skip.detail().starts_with("bad_picture: jpg: ")), "{skips:?}");
    // All but the last are full although a picture in eight fails to decode.
    assert!(shares[..shares.len() - 1].iter().all(|share| share.num_samples() == 6));
}

#[test]
fn batches_are_of_one_bucket_and_their_samples_complete() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(10, 2));
    rig.handle.grant(vec![lease(0, 3, &write_shard(folder.path(), 0, &mixed(64)))], true);
    for share in rig.drain(8) {
        for batch in share.batches {
            assert!((1..=4).contains(&batch.samples.len()));
            let (width, height) = batch.bucket;
            for sample in batch.samples {
                assert!(matches!(&sample.content, Content::Pixels(pixels) if pixels.len() == (width * height * 3) as usize));
                assert_eq!(sample.original_size, if width == 32 { (64, 32) } else { (40, 36) });
                assert_eq!(sample.prompt, sample.name.index.to_string());
                assert_eq!((sample.name.epoch, sample.lease), (Epoch(3), LeaseId(100)));
                assert_eq!(sample.draws.noise.len(), (4 * width / 8 * height / 8) as usize);
                // 40 x 36 becomes 17 x 16: the crop starts in column 0 or 1.
                assert!(sample.crop.0 == 0 && sample.crop.1 <= 1);
            }
        }
    }
}

/// The batches of a run, as text.
fn run(folder: &Path, decode_threads: u32, grant_at_once: bool) -> String {
    let mut rig = Rig::start(config(20, decode_threads));
    let mut leases: Vec<_> = (0..4).map(|shard| lease(shard, 0, &format!("{}/{shard:05}.tar", folder.display()))).collect();
    if grant_at_once {
        rig.handle.grant(leases, true);
    } else {
        let handle = rig.handle.clone();
        let events = std::mem::replace(&mut rig.events, channel().1);
        leases.reverse();
        std::thread::spawn(move || {
            for event in events {
                if let LoaderEvent::NeedLeases { .. } = event {
                    let next = leases.pop();
                    handle.grant(next.into_iter().collect(), leases.is_empty());
                }
            }
        });
    }
    let mut text = String::new();
    for share in rig.drain(10) {
        for batch in share.batches {
            let indices: Vec<String> = batch.samples.iter().map(|sample| format!("{}:{:?}", sample.name, sample.crop)).collect();
            write!(text, "{:?} {} | ", batch.bucket, indices.join(" ")).unwrap();
        }
        text.push('\n');
    }
    text
}

#[test]
fn the_sequence_of_shares_does_not_depend_on_threads_or_time() {
    let folder = tempfile::tempdir().unwrap();
    for shard in 0..4 {
        write_shard(folder.path(), shard, &mixed(50 + shard as usize));
    }
    let first = run(folder.path(), 1, true);
    assert!(first.lines().count() > 10);
    for (decode_threads, grant_at_once) in [(1, true), (4, true), (2, false), (3, false)] {
        assert_eq!(run(folder.path(), decode_threads, grant_at_once), first);
    }
}

#[test]
fn shares_are_shuffled_across_shards() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(60, 1));
    let leases = (0..2).map(|shard| lease(shard, 0, &write_shard(folder.path(), shard, &[Kind::Good; 30]))).collect();
    rig.handle.grant(leases, true);
    let first = rig.loader.next_share(20).unwrap();
    let of_second = first.names().filter(|name| name.shard == ShardId(1)).count();
    assert!((3..=17).contains(&of_second), "{of_second} of 20 from the second shard");
}

#[test]
fn a_share_put_back_comes_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(12, 2));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &mixed(200)))], true);
    let mut all = Vec::new();
    loop {
        let share = rig.loader.next_share(10).unwrap();
        // Three times, as three steps in a row may be void.
        for _ in 0..3 {
            rig.loader.put_back(share.clone());
            assert_eq!(rig.loader.next_share(10).unwrap(), share);
        }
        assert!(rig.handle.stats().planned_samples <= 40, "planned ahead without end");
        if share.num_samples() == 0 {
            break;
        }
        all.extend(share.names());
    }
    let num_handed_out = all.len();
    all.sort();
    all.dedup();
    assert_eq!((all.len(), num_handed_out), (125, 125));
}

/// Takes the next share ahead as soon as its pictures are decoded.
fn share_ahead(rig: &mut Rig, num_samples: usize) -> Share {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match rig.loader.share_ahead(num_samples) {
            Some(share) => return share,
            None if Instant::now() < deadline => std::thread::yield_now(),
            None => panic!("no share of {num_samples}: {:?}", rig.handle.stats()),
        }
    }
}

#[test]
fn shares_taken_ahead_are_those_that_would_have_come() {
    let folder = tempfile::tempdir().unwrap();
    let url = write_shard(folder.path(), 0, &mixed(200));
    let start = || {
        let rig = Rig::start(config(12, 2));
        rig.handle.grant(vec![lease(0, 0, &url)], true);
        rig
    };
    let expected = start().drain(10);
    let whole = expected.iter().filter(|share| share.num_samples() == 10).count();

    let mut rig = start();
    assert_eq!(rig.loader.share_ahead(10), None, "no share of this size has been asked for");
    for (number, expected) in expected[..whole].iter().enumerate() {
        let share = if number % 3 == 0 { rig.loader.next_share(10).unwrap() } else { share_ahead(&mut rig, 10) };
        assert_eq!(share, *expected, "share {number}");
        assert_eq!(rig.loader.share_ahead(9), None, "of another size");
    }
    assert_eq!(rig.loader.share_ahead(10), None, "what is left is no whole share");
    assert_eq!(rig.drain(10), expected[whole..]);
}

#[test]
fn shares_put_back_the_last_one_first_come_again_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(12, 2));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &mixed(200)))], true);
    let mut all = Vec::new();
    for _ in 0..6 {
        let shares = [rig.loader.next_share(10).unwrap(), share_ahead(&mut rig, 10)];
        let [first, second] = shares.clone();
        rig.loader.put_back(second);
        rig.loader.put_back(first);
        assert_eq!([rig.loader.next_share(10).unwrap(), share_ahead(&mut rig, 10)], shares);
        all.extend(names(&shares));
    }
    all.extend(names(&rig.drain(10)));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 125);
}

#[test]
fn nothing_is_taken_ahead_of_a_cancelled_loader() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(12, 2));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 40]))], true);
    let first = rig.loader.next_share(10).unwrap();
    let second = share_ahead(&mut rig, 10);
    rig.loader.put_back(second.clone());
    rig.handle.cancel();
    assert_eq!(rig.loader.share_ahead(10), None);
    rig.handle.resume();
    assert_eq!(share_ahead(&mut rig, 10), second);
    assert_eq!(first.num_samples(), 10);
}

#[test]
fn another_size_of_share_uses_what_was_planned() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(12, 2));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 90]))], true);
    let mut all = Vec::new();
    for num_samples in [10, 3, 25, 0, 7, 40, 10] {
        let share = rig.loader.next_share(num_samples).unwrap();
        assert_eq!(share.num_samples(), num_samples.min(90 - all.len()));
        all.extend(share.names());
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 90);
}

#[test]
fn leases_taken_away_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(30, 2));
    let leases: Vec<_> = (0..3).map(|shard| lease(shard, 0, &write_shard(folder.path(), shard, &[Kind::Good; 40]))).collect();
    rig.handle.grant(leases, true);
    let share = rig.loader.next_share(10).unwrap();
    let kept_of_share = share.names().filter(|name| name.shard == ShardId(1)).count();
    rig.loader.put_back(share);
    rig.loader.retain_leases(&[LeaseId(101)]);
    let shares = rig.drain(10);
    let mut all = names(&shares);
    assert!(all.iter().all(|name| name.shard == ShardId(1)));
    all.sort();
    assert_eq!(all.iter().map(|name| name.index).collect::<Vec<_>>(), (0..40).collect::<Vec<_>>());
    assert!(names(&shares[..1]).len() >= kept_of_share);
    assert!(shares[..4].iter().all(|share| share.num_samples() == 10));
    assert_eq!(rig.handle.stats(), Stats { is_at_end: true, ..Stats::default() });
}

#[test]
fn a_share_put_back_after_its_lease_is_gone_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(5, 1));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 20]))], true);
    let share = rig.loader.next_share(5).unwrap();
    rig.loader.retain_leases(&[]);
    rig.loader.put_back(share);
    assert_eq!(rig.loader.next_share(5).unwrap().num_samples(), 0);
}

#[test]
fn cancelling_interrupts_the_wait_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(5, 1));
    // Eight samples, and more are promised: a share of ten has to wait.
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 8]))], false);
    rig.reports(LeaseId(100));
    let handle = rig.handle.clone();
    let waiter = std::thread::spawn(move || {
        let outcome = rig.loader.next_share(10);
        (rig, outcome)
    });
    handle.cancel();
    let (mut rig, outcome) = waiter.join().unwrap();
    assert!(matches!(outcome, Err(Error::Cancelled)));
    assert!(matches!(rig.loader.next_share(1), Err(Error::Cancelled)), "until resumed");
    handle.resume();
    handle.grant(vec![lease(1, 0, &write_shard(folder.path(), 1, &[Kind::Good; 8]))], true);
    assert_eq!(rig.drain(10).iter().map(Share::num_samples).collect::<Vec<_>>(), [10, 6]);
}

#[test]
fn an_epochs_leftovers_are_trained_with_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let url = write_shard(folder.path(), 0, &[Kind::Good; 15]);
    let mut rig = Rig::start(config(4, 1));
    let next = LeasedShard { lease: LeaseId(900), ..lease(0, 1, &url) };
    rig.handle.grant(vec![lease(0, 0, &url), next], true);
    let shares = rig.drain(10);
    assert_eq!(shares.iter().map(Share::num_samples).collect::<Vec<_>>(), [10, 10, 10]);
    let epochs: Vec<u32> = shares[1].names().map(|name| name.epoch.0).collect();
    assert!(epochs.contains(&0) && epochs.contains(&1), "{epochs:?}");
}

#[test]
fn shares_are_whole_again_after_a_short_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(4, 1));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 6]))], true);
    assert_eq!(rig.loader.next_share(8).unwrap().num_samples(), 6);
    assert_eq!(rig.loader.next_share(8).unwrap().num_samples(), 0);
    rig.handle.ask_again();
    rig.handle.grant(vec![lease(1, 1, &write_shard(folder.path(), 1, &[Kind::Good; 40]))], true);
    for share in rig.drain(8) {
        assert_eq!(share.batches.iter().map(|batch| batch.samples.len()).collect::<Vec<_>>(), [4, 4]);
    }
}

#[test]
fn failures_do_not_leave_batches_fragmented() {
    let folder = tempfile::tempdir().unwrap();
    // Runs of four of a bucket: in tar order each makes a batch.
    let mut kinds: Vec<Kind> =
        (0..120).map(|index| if 0b1101_0011_1001 >> (index / 4 % 12) & 1 == 1 { Kind::Good } else { Kind::Wide }).collect();
    kinds[3] = Kind::BreaksOff;
    let mut rig = Rig::start(config(1, 2));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &kinds))], true);
    let shapes: Vec<Vec<usize>> =
        rig.drain(8).iter().map(|share| share.batches.iter().map(|batch| batch.samples.len()).collect()).collect();
    assert_eq!((shapes.len(), &shapes[0]), (15, &vec![3, 4, 1]));
    assert!(shapes[4..14].iter().all(|shape| shape == &[4, 4]), "{shapes:?}");
}

#[test]
fn a_shard_whose_pictures_all_fail_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(4, 2));
    let bad = write_shard(folder.path(), 0, &[Kind::BreaksOff; 50]);
    let good = write_shard(folder.path(), 1, &[Kind::Good; 9]);
    rig.handle.grant(vec![lease(0, 0, &bad), lease(1, 0, &good)], true);
    assert_eq!(rig.drain(5).iter().map(Share::num_samples).collect::<Vec<_>>(), [5, 4]);
    assert_eq!(rig.all_skips().len(), 50);
}

#[test]
fn leases_are_asked_for_once_and_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let rig = Rig::start(config(1000, 1));
    let need = |num| LoaderEvent::NeedLeases { num, is_idle: false };
    let next = || rig.events.recv_timeout(PATIENCE).unwrap();
    assert_eq!(next(), need(2));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 2]))], false);
    // One of two came: the other is asked for at once, and once more when the first is read.
    assert_eq!(next(), need(1));
    assert!(matches!(next(), LoaderEvent::Shard { lease: LeaseId(100), end: Some(ShardEnd { num_samples: 2, .. }), .. }));
    rig.handle.grant(Vec::new(), true);
    rig.handle.grant(Vec::new(), false);
    assert_eq!(next(), need(2), "not while none were left");
    rig.handle.ask_again();
    assert_eq!(next(), need(2));
    assert!(rig.events.try_recv().is_err());
}

#[test]
fn what_a_lease_says_is_done_is_passed_over_in_silence() {
    let folder = tempfile::tempdir().unwrap();
    let mut shard = lease(0, 0, &write_shard(folder.path(), 0, &mixed(16)));
    for index in 0..14 {
        shard.done.insert(index);
    }
    let mut rig = Rig::start(config(4, 1));
    rig.handle.grant(vec![shard.clone(), shard], true);
    assert_eq!(names(&rig.drain(3)).iter().map(|name| name.index).collect::<Vec<_>>(), [14]);
    let (skips, end) = rig.reports(LeaseId(100));
    assert_eq!(skips.iter().map(|skip| skip.index).collect::<Vec<_>>(), [15]);
    assert_eq!(end, ShardEnd { num_samples: 16, truncated: None });
    assert!(rig.all_skips().is_empty(), "a lease granted twice is read once");
}

#[test]
fn missing_and_truncated_shards_end_with_their_reason() {
    let folder = tempfile::tempdir().unwrap();
    let url = write_shard(folder.path(), 0, &[Kind::Good; 10]);
    let bytes = std::fs::read(&url).unwrap();
    std::fs::write(&url, &bytes[..bytes.len() / 2 + 100]).unwrap();
    let mut rig = Rig::start(config(4, 1));
    rig.handle.grant(vec![lease(1, 0, "/no/such.tar"), lease(0, 0, &url)], true);
    let (skips, end) = rig.reports(LeaseId(101));
    assert!(skips.is_empty() && end.num_samples == 0 && end.truncated.unwrap().starts_with("open /no/such.tar"));
    let (skips, end) = rig.reports(LeaseId(100));
    assert!(end.truncated.is_some() && end.num_samples < 10);
    assert_eq!(names(&rig.drain(20)).len() + skips.len(), end.num_samples as usize);
}

#[test]
fn file_that_cannot_be_read_is_neither_lost_nor_broken() {
    let folder = tempfile::tempdir().unwrap();
    let url = folder.path().to_str().unwrap();
    let mut rig = Rig::start(config(4, 1));
    rig.handle.grant(vec![lease(0, 0, url)], true);
    let error = rig.loader.next_share(20).unwrap_err().to_string();
    assert_eq!(error, format!("read {url}: Is a directory (os error 21); this is a folder: name the tars in it"));
    drop(rig.loader);
    assert!(rig.events.try_iter().all(|event| !matches!(event, LoaderEvent::Shard { .. })), "nothing is said of what it holds");
}

/// A shard behind a server that answers its beginning, and nothing more after that.
fn served(tar: &[u8], fault: Fault) -> (FileServer, String) {
    let server = FileServer::start();
    server.put("0.tar", tar);
    server.set_habits(Habits { ignores_ranges: true, fails_every: Some((1, fault)), ..Habits::default() });
    let url = server.url("0.tar");
    (server, url)
}

#[test]
fn shard_whose_store_fails_is_neither_lost_nor_broken() {
    let folder = tempfile::tempdir().unwrap();
    let tar = std::fs::read(write_shard(folder.path(), 0, &[Kind::Good; 10])).unwrap();
    // In the middle of a picture.
    let (server, url) = served(&tar, Fault::CutAfter(tar.len() / 2 + 600));
    let mut config = config(4, 1);
    (config.data.retries, config.data.give_up_after) = (0, Duration::ZERO);
    let mut rig = Rig::start(config);
    rig.handle.grant(vec![lease(0, 0, &url)], true);
    for _ in 0..2 {
        match rig.loader.next_share(20).unwrap_err() {
            Error::Store(error) => assert!(error.url == url && error.reason.starts_with("the answer breaks off"), "{error}"),
            other => panic!("{other}"),
        }
    }
    assert!(rig.all_skips().is_empty(), "half a sample is not a bad one");
    drop(server);
}

#[test]
fn loader_stops_and_leases_end_while_a_store_is_waited_for() {
    let (_server, url) = served(&[0; 4096], Fault::StallAfter(0));
    let folder = tempfile::tempdir().unwrap();
    let good = write_shard(folder.path(), 1, &[Kind::Good; 4]);
    let mut rig = Rig::start(config(4, 1));
    rig.handle.grant(vec![lease(0, 0, &url), lease(1, 1, &good)], true);
    // Only without the first does the reader come to the second.
    rig.loader.retain_leases(&[LeaseId(101)]);
    assert_eq!(rig.loader.next_share(4).unwrap().num_samples(), 4);
    rig.handle.grant(vec![lease(2, 0, &url)], true);
    drop(rig);
}

/// One sample more fits into the stream and the pool each, and a share into the plan, however large.
#[test]
fn the_byte_budget_is_never_exceeded_and_nothing_is_thrown_away_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let pictures: Vec<Vec<u8>> = (0..120).map(|index| noisy_jpeg(if index % 3 == 0 { 128 } else { 64 }, 64, index)).collect();
    let largest = pictures.iter().map(Vec::len).max().unwrap() as u64 + 1000;
    let json = br#"{"caption_zh": "x", "caption_en": "x"}"#;
    let member_names: Vec<[String; 2]> = (0..pictures.len()).map(|index| [format!("{index:04}.jpg"), format!("{index:04}.json")]).collect();
    let members: Vec<(&str, &[u8])> = pictures
        .iter()
        .zip(&member_names)
        .flat_map(|(picture, [jpg, caption])| [(jpg.as_str(), &picture[..]), (caption.as_str(), &json[..])])
        .collect();
    let url = folder.path().join("00000.tar");
    std::fs::write(&url, tar_of(&members)).unwrap();

    let mut config = config(1000, 2);
    config.data.buffer_bytes = 8 * largest;
    assert!(config.data.buffer_bytes < pictures.iter().map(|picture| picture.len() as u64).sum::<u64>() / 4, "the budget matters");
    let mut rig = Rig::start(config.clone());
    let is_done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let watcher = std::thread::spawn({
        let (handle, is_done) = (rig.handle.clone(), is_done.clone());
        move || {
            let mut peak = 0;
            while !is_done.load(Ordering::Relaxed) {
                let stats = handle.stats();
                peak = (stats.buffered_bytes + stats.planned_bytes).max(peak);
                std::thread::yield_now();
            }
            peak
        }
    });
    rig.handle.grant(vec![lease(0, 0, url.to_str().unwrap())], true);
    let shares = rig.drain(6);
    is_done.store(true, Ordering::Relaxed);
    let peak = watcher.join().unwrap();
    let allowed = config.data.buffer_bytes + (2 + 6) * (largest + 32 * 16 * 3);
    assert!(peak <= allowed, "{peak} bytes at once, {allowed} allowed");
    assert!(peak >= 2 * largest, "{peak}: the buffers were used");
    let mut indices: Vec<u32> = names(&shares).iter().map(|name| name.index).collect();
    indices.sort_unstable();
    assert_eq!(indices, (0..120).collect::<Vec<_>>(), "each once");
    assert!(
        shares
            .iter()
            .flat_map(|share| &share.batches)
            .all(|batch| batch.samples.iter().all(|sample| sample.original_size.0 == 4 * batch.bucket.0))
    );
}

#[test]
fn planning_stops_at_its_bytes_after_one_share_and_plans_the_same_batches() {
    let folder = tempfile::tempdir().unwrap();
    let url = write_shard(folder.path(), 0, &mixed(200));
    let start = |buffer_bytes| {
        let mut config = config(4, 2);
        config.data.buffer_bytes = buffer_bytes;
        let rig = Rig::start(config);
        rig.handle.grant(vec![lease(0, 0, &url)], true);
        rig
    };
    let expected = start(1 << 20).drain(6);
    // Enough for the pool, and a quarter of it for less than two pictures.
    let mut rig = start(16 << 10);
    let mut shares = Vec::new();
    loop {
        let share = rig.loader.next_share(6).unwrap();
        let stats = rig.handle.stats();
        // Those that did not decode stay until their share is handed out.
        assert!(stats.planned_samples <= 12, "{stats:?}");
        if share.num_samples() == 0 {
            break;
        }
        shares.push(share);
    }
    assert!(shares.len() > 10 && shares == expected);
}

#[test]
fn a_loader_is_dropped_in_the_middle_of_everything() {
    let folder = tempfile::tempdir().unwrap();
    let url = write_shard(folder.path(), 0, &mixed(100));
    for num_samples in [0, 1, 10] {
        let mut rig = Rig::start(config(4, 2));
        rig.handle.grant(vec![lease(0, 0, &url)], false);
        assert_eq!(rig.loader.next_share(num_samples).unwrap().num_samples(), num_samples);
    }
}

#[test]
fn contradictions_in_the_configuration_are_refused() {
    let refused = |change: fn(&mut LoaderConfig)| {
        let mut config = config(4, 1);
        change(&mut config);
        matches!(Loader::start(config, |_| {}), Err(Error::Config(_)))
    };
    assert!(refused(|config| config.micro_batch = 0));
    assert!(refused(|config| config.data.buckets = vec![[20, 16]]));
    assert!(refused(|config| config.data.buckets.clear()));
    assert!(refused(|config| config.vae_scale = 0));
}

#[test]
fn the_demo_shards_are_read_whole() {
    let mut config = config(100, 1);
    config.data.buckets = vec![[64, 64], [96, 64], [64, 96]];
    let mut rig = Rig::start(config);
    rig.handle.grant(vec![lease(0, 0, concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/demo/shards/00000.tar"))], true);
    let shares = rig.drain(32);
    assert_eq!(names(&shares).len(), 256);
    let native = shares.iter().flat_map(|share| &share.batches).flat_map(|batch| &batch.samples).filter(|sample| sample.native).count();
    assert!((32..=96).contains(&native), "{native} of 256: about a quarter");
    let (skips, end) = rig.reports(LeaseId(100));
    assert_eq!((skips.len(), end), (0, ShardEnd { num_samples: 256, truncated: None }));
}
