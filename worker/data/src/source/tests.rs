//! Reads from a server that fails as it is told to.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use peapod_proto::ids::Bitmap;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::*;
use crate::shard::{Found, ShardEnd, read_shard};
use crate::testing::http::{Fault, FileServer, Habits};
use crate::testing::tar_of;

const SIZE: usize = 10_500;

fn options() -> SourceOptions {
    SourceOptions {
        read_timeout: Duration::from_millis(300),
        retries: 3,
        chunk_bytes: 1000,
        first_pause: Duration::from_millis(1),
        ..SourceOptions::default()
    }
}

fn content(seed: u32) -> Vec<u8> {
    (0..SIZE as u32).map(|at| (at.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

fn serving(bytes: &[u8]) -> (FileServer, String) {
    let server = FileServer::start();
    server.put("0.tar", bytes);
    let url = server.url("0.tar");
    (server, url)
}

fn read_with(sources: &Sources, url: &str) -> Result<Vec<u8>> {
    let mut stream = sources.open(url, || false)?;
    let (mut all, halt) = (Vec::new(), stream.halt());
    let read = stream.read_to_end(&mut all);
    halt.check()?;
    read.unwrap();
    Ok(all)
}

fn read(url: &str) -> Result<Vec<u8>> {
    read_with(&Sources::new(options()), url)
}

fn store_error(result: Result<Vec<u8>>) -> StoreError {
    match result {
        Err(Error::Store(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn object_is_read_in_ranges_each_asked_for_once() {
    let (server, url) = serving(&content(0));
    assert!(read(&url).unwrap() == content(0));
    let mut requests = server.take_requests();
    requests.sort();
    let mut wanted: Vec<String> = (0..11).map(|part| format!("GET /0.tar {}-{}", part * 1000, (part * 1000 + 999).min(SIZE - 1))).collect();
    wanted.sort();
    assert_eq!(requests, wanted);
}

#[test]
fn no_more_than_two_pieces_are_fetched_ahead() {
    let (server, url) = serving(&content(0));
    let sources = Sources::new(options());
    let mut stream = sources.open(&url, || false).unwrap();
    let mut seen = Vec::new();
    for _ in 0..100 {
        seen.extend(server.take_requests());
        if seen.len() >= 3 {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // Nobody reads on: time for mistakes.
    std::thread::sleep(Duration::from_millis(200));
    seen.extend(server.take_requests());
    assert_eq!(seen.len(), 3, "{seen:?}");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert!(all == content(0));
}

#[test]
fn server_that_knows_no_ranges_is_read_whole_and_again_after_a_break() {
    for says_little in [false, true] {
        let (server, url) = serving(&content(0));
        server.set_habits(Habits { ignores_ranges: true, says_little, ..Habits::default() });
        assert!(read(&url).unwrap() == content(0));
        assert_eq!(server.take_requests().len(), 1);
    }
    let (server, url) = serving(&content(0));
    server.set_habits(Habits { ignores_ranges: true, ..Habits::default() });
    server.fail_next([Fault::CutAfter(2500), Fault::StallAfter(7000)]);
    assert!(read(&url).unwrap() == content(0));
    assert_eq!(server.take_requests().len(), 3);
}

#[test]
fn stalled_or_broken_reads_go_on_at_the_byte_where_they_stopped() {
    for fault in [Fault::StallAfter(300), Fault::CutAfter(300)] {
        let (server, url) = serving(&content(0)[..1000]);
        server.fail_next([fault]);
        assert!(read(&url).unwrap() == content(0)[..1000], "{fault:?}");
        assert_eq!(server.take_requests(), ["GET /0.tar 0-999", "GET /0.tar 300-999"], "{fault:?}");
    }
}

#[test]
fn server_that_answers_less_than_it_is_asked_for_is_asked_for_the_rest() {
    let (server, url) = serving(&content(0)[..1000]);
    server.set_habits(Habits { max_part: Some(400), ..Habits::default() });
    let impatient = Sources::new(SourceOptions { retries: 0, ..options() });
    assert!(read_with(&impatient, &url).unwrap() == content(0)[..1000]);
    assert_eq!(server.take_requests(), ["GET /0.tar 0-999", "GET /0.tar 400-999", "GET /0.tar 800-999"]);
}

#[test]
fn any_number_of_breaks_is_outlived_as_long_as_bytes_come() {
    let (server, url) = serving(&content(0));
    // More of them than there are retries.
    server.fail_next([Fault::CutAfter(10); 30]);
    assert!(read(&url).unwrap() == content(0));
}

#[test]
fn errors_of_the_server_are_tried_again() {
    let (server, url) = serving(&content(0)[..1000]);
    server.fail_next([Fault::Status(500), Fault::Status(503), Fault::Status(429)]);
    assert!(read(&url).unwrap() == content(0)[..1000]);
    assert_eq!(server.take_requests().len(), 4);
}

#[test]
fn refusals_are_not_tried_again() {
    let (server, url) = serving(&content(0));
    let error = read(&server.url("1.tar")).unwrap_err();
    assert!(matches!(error, Error::Open { .. }) && error.to_string().ends_with("/1.tar: the server answers 404 Not Found"), "{error}");
    server.fail_next([Fault::Status(403)]);
    assert_eq!(store_error(read(&url)), StoreError { denied: true, ..StoreError::new(&url, "the server answers 403 Forbidden") });
    assert_eq!(server.take_requests().len(), 2);
}

#[test]
fn store_that_stays_down_is_given_up_when_it_has_been_long_enough() {
    let (server, url) = serving(&content(0));
    server.set_habits(Habits { fails_every: Some((1, Fault::Status(500))), ..Habits::default() });
    let error = store_error(read(&url));
    assert!(error.reason.starts_with("the server answers 500 Internal Server Error; given up after 4 attempts in "), "{error}");
    assert_eq!((error.url, server.take_requests().len()), (url.clone(), 4));

    let give_up_after = Duration::from_millis(400);
    let begun = Instant::now();
    let sources = Sources::new(SourceOptions { give_up_after, ..options() });
    store_error(read_with(&sources, &url));
    assert!(begun.elapsed() >= give_up_after && server.take_requests().len() > 4);

    // A port at which nobody listens.
    drop(server);
    let error = store_error(read(&url));
    assert!(error.reason.starts_with("cannot connect: ") && error.to_string().starts_with(&format!("read {url}: ")), "{error}");
}

#[test]
fn store_that_comes_back_costs_nothing() {
    let (server, url) = serving(&content(0));
    server.set_habits(Habits { fails_every: Some((1, Fault::Status(500))), ..Habits::default() });
    let sources = Sources::new(SourceOptions { give_up_after: Duration::from_secs(60), ..options() });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            server.set_habits(Habits::default());
        });
        assert!(read_with(&sources, &url).unwrap() == content(0));
    });
}

#[test]
fn object_that_changes_while_it_is_read_is_an_error_that_names_it() {
    for habits in [Habits::default(), Habits { weak_tags: true, ..Habits::default() }, Habits { ignores_ranges: true, ..Habits::default() }]
    {
        let (server, url) = serving(&content(0));
        server.set_habits(habits);
        let sources = Sources::new(options());
        // Where ranges are known it is asked again anyway.
        server.fail_next([Fault::StallAfter(5000)]);
        let mut stream = sources.open(&url, || false).unwrap();
        server.put("0.tar", &content(1));
        let halt = stream.halt();
        assert!(stream.read_to_end(&mut Vec::new()).is_err());
        let error = halt.check().unwrap_err().to_string();
        assert!(error.starts_with(&format!("read {url}: it was changed while it was read")), "{error}");
    }
}

#[test]
fn waiting_for_a_store_can_be_cancelled() {
    let (server, url) = serving(&content(0));
    let sources = Sources::new(SourceOptions { read_timeout: Duration::from_secs(60), ..options() });
    server.fail_next([Fault::StallAfter(0); 3]);
    let is_cancelled = AtomicBool::new(false);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            is_cancelled.store(true, Ordering::Release);
        });
        // Its beginning is awaited, for the compression.
        let opened = sources.open(&url, || is_cancelled.load(Ordering::Acquire));
        assert!(matches!(opened.err().unwrap(), Error::Cancelled));
    });
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn objects_of_all_sizes_and_kinds_are_read() {
    let server = FileServer::start();
    let sources = Sources::new(options());
    for size in [0, 1, 999, 1000, 1001, 3000] {
        let bytes = &content(0)[..size];
        server.put("0.tar", bytes);
        assert!(read_with(&sources, &server.url("0.tar?signature=abc")).unwrap() == bytes, "{size}");
    }
    let tar = tar_of(&[("a.jpg", &content(0)), ("b.jpg", &content(1))]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    for packed in [tar.clone(), gzip.finish().unwrap(), compress_to_vec(&tar[..], CompressionLevel::Fastest)] {
        server.put("0.tar", &packed);
        server.fail_next([Fault::CutAfter(100)]);
        let stream = sources.open(&server.url("0.tar"), || false).unwrap();
        let mut keys = Vec::new();
        let end = read_shard(stream, &Bitmap::default(), |found| {
            if let Found::Sample(sample) = found {
                keys.push(sample.key);
            }
            std::ops::ControlFlow::Continue(())
        });
        assert_eq!((keys.join(" "), end), ("a b".to_owned(), Some(ShardEnd { num_samples: 2, truncated: None })));
    }
}

#[test]
fn damaged_tar_is_no_failure_of_its_store() {
    let tar = tar_of(&[("a.jpg", &content(0)), ("b.jpg", &content(1))]);
    let (_server, url) = serving(&tar[..tar.len() * 2 / 3]);
    let sources = Sources::new(options());
    let mut stream = sources.open(&url, || false).unwrap();
    let halt = stream.halt();
    let end = read_shard(&mut stream, &Bitmap::default(), |_| std::ops::ControlFlow::Continue(())).unwrap();
    assert!(end.truncated.unwrap().contains("breaks off") && !halt.is_set());
}

#[test]
fn look_tells_sizes_and_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let local = folder.path().join("local.tar").to_str().unwrap().to_owned();
    std::fs::write(&local, b"12345").unwrap();
    let (server, url) = serving(&content(0));
    let sources = Sources::new(options());
    let urls = [url.clone(), local, server.url("1.tar"), "/no/such.tar".into(), "http://127.0.0.1:1/0.tar".into()];
    let seen = sources.look(&urls);
    assert_eq!(seen[..4], [Seen::Bytes(SIZE as u64), Seen::Bytes(5), Seen::Missing, Seen::Missing]);
    assert!(matches!(&seen[4], Seen::Unknown(why) if why.starts_with("cannot connect")), "{seen:?}");
    server.set_habits(Habits { refuses_head: true, ..Habits::default() });
    assert_eq!(sources.look(&[url]), [Seen::Bytes(SIZE as u64)]);
}

#[test]
fn store_that_this_build_lacks_names_the_feature() {
    for (url, is_built, wanted) in [
        ("s3://bucket/0.tar", cfg!(feature = "aws"), "this build has no S3 support: build with --features aws"),
        ("gs://bucket/0.tar", cfg!(feature = "gcp"), "this build has no Google Cloud Storage support: build with --features gcp"),
        ("abfs://container/0.tar", cfg!(feature = "azure"), "this build has no Azure support: build with --features azure"),
    ] {
        if !is_built {
            assert_eq!(open(url).err().unwrap().to_string(), format!("{url}: {wanted}"));
            assert_eq!(expand_shards(&[url.to_owned()]).unwrap_err().to_string(), format!("{url}: {wanted}"));
        }
    }
}

#[test]
fn a_missing_file_is_an_error_that_names_it() {
    assert!(open("/no/such/shard.tar").err().unwrap().to_string().starts_with("open /no/such/shard.tar: "));
}

// ---- the cache ----

fn cached(folder: &Path, max_bytes: usize) -> Sources {
    Sources::new(SourceOptions { cache: Some((folder.to_owned(), max_bytes as u64)), ..options() })
}

/// Names in a cache's folder, but for its lock.
fn kept(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "lock").collect()
}

fn num_reads(server: &FileServer) -> usize {
    server.take_requests().iter().filter(|request| request.starts_with("GET")).count()
}

#[test]
fn shard_of_a_list_that_is_signed_anew_is_read_from_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let (server, url) = serving(&content(0));
    for (query, reads) in [("X-Amz-Date=1&X-Amz-Signature=a", 11), ("X-Amz-Date=2&X-Amz-Signature=b", 0), ("part=1", 11), ("part=2", 11)] {
        assert!(read_with(&cached(folder.path(), 1 << 20), &format!("{url}?{query}")).unwrap() == content(0));
        assert_eq!(num_reads(&server), reads, "{query}");
    }
}

#[test]
fn errors_do_not_show_how_an_address_is_signed() {
    let (server, url) = serving(&content(0));
    server.fail_next([Fault::Status(403)]);
    let error = store_error(read(&format!("{url}?Signature=secret")));
    assert_eq!(
        (error.to_string(), error.url),
        (format!("read {url}?...: the server answers 403 Forbidden"), format!("{url}?Signature=secret"))
    );
    let error = read(&server.url("1.tar?Signature=secret")).unwrap_err().to_string();
    assert!(error.starts_with(&format!("open {}?...: ", server.url("1.tar"))), "{error}");
}

#[test]
fn shard_is_fetched_once_and_read_from_the_cache_by_others() {
    let folder = tempfile::tempdir().unwrap();
    let (server, url) = serving(&content(0));
    for reads in [11, 0, 0] {
        assert!(read_with(&cached(folder.path(), 1 << 20), &url).unwrap() == content(0));
        assert_eq!(num_reads(&server), reads);
    }
    // A store that is down is not needed by who has asked it before, one with another version is.
    let sources = cached(folder.path(), 1 << 20);
    server.put("0.tar", &content(1));
    assert!(read_with(&sources, &url).unwrap() == content(1));
    assert_eq!(num_reads(&server), 11);
    drop(server);
    assert!(read_with(&sources, &url).unwrap() == content(1));
    // Another job cannot know that this is still the shard's version.
    assert!(store_error(read_with(&cached(folder.path(), 1 << 20), &url)).reason.starts_with("cannot connect"));
}

#[test]
fn asking_for_the_version_of_a_cached_shard_can_be_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let (server, url) = serving(&content(0));
    let sources = Sources::new(SourceOptions {
        cache: Some((folder.path().to_owned(), 1 << 20)),
        read_timeout: Duration::from_secs(60),
        ..options()
    });
    read_with(&sources, &url).unwrap();
    assert!(matches!(sources.open(&url, || true).err(), Some(Error::Cancelled)), "while the file is checked");
    drop(server);
    // It is connected to, and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/0.tar", silent.local_addr().unwrap());
    let begun = Instant::now();
    assert!(matches!(sources.open(&url, || begun.elapsed() > Duration::from_millis(100)).err(), Some(Error::Cancelled)));
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn damaged_cache_file_is_fetched_again() {
    let folder = tempfile::tempdir().unwrap();
    let (server, url) = serving(&content(0));
    let sources = cached(folder.path(), 1 << 20);
    read_with(&sources, &url).unwrap();
    let path = folder.path().join(&kept(folder.path())[0]);
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[5000] ^= 1;
    for damaged in [&flipped[..], &whole[..4000], b""] {
        std::fs::write(&path, damaged).unwrap();
        let _ = server.take_requests();
        assert!(read_with(&sources, &url).unwrap() == content(0));
        assert_eq!(num_reads(&server), 11);
    }
    assert_eq!(kept(folder.path()).len(), 1);
}

#[test]
fn shards_that_were_used_longest_ago_make_room() {
    let folder = tempfile::tempdir().unwrap();
    let server = FileServer::start();
    let url = |number: u32| server.url(&format!("{number}.tar"));
    (0..4).for_each(|number| server.put(&format!("{number}.tar"), &content(number)));
    let sources = cached(folder.path(), 3 * SIZE);
    // The third comes in the place of the second, for the first was read again meanwhile.
    for number in [0, 1, 2, 0, 3] {
        assert!(read_with(&sources, &url(number)).unwrap() == content(number));
        std::thread::sleep(Duration::from_millis(20));
        let _ = server.take_requests();
    }
    assert_eq!(kept(folder.path()).len(), 3);
    for (number, reads) in [(0, 0), (2, 0), (3, 0), (1, 11)] {
        assert!(read_with(&sources, &url(number)).unwrap() == content(number));
        assert_eq!(num_reads(&server), reads, "{number}");
    }
    // One that is larger than the cache pushes nothing out.
    assert!(read_with(&cached(folder.path(), SIZE - 1), &url(0)).is_ok());
    assert_eq!(kept(folder.path()).len(), 3);
}

#[test]
fn unfinished_and_abandoned_files_do_not_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (server, url) = serving(&content(0));
    let sources = cached(folder.path(), 3 * SIZE);
    let mut stream = sources.open(&url, || false).unwrap();
    assert!(kept(folder.path()).iter().all(|name| name.ends_with(".part")) && kept(folder.path()).len() == 1);
    // Its size is reserved while it is being filled: of two others one fits beside it, and it is not taken for abandoned.
    for number in 1..3 {
        server.put(&format!("{number}.tar"), &content(number));
        read_with(&sources, &server.url(&format!("{number}.tar"))).unwrap();
    }
    assert_eq!(kept(folder.path()).len(), 3);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert!(all == content(0));
    drop(stream);
    assert!(kept(folder.path()).iter().all(|name| name.ends_with(".shard")));
    // What a killed process leaves: a file that nobody has locked.
    let abandoned = folder.path().join(format!("a-b-{SIZE}-1-0.part"));
    std::fs::write(&abandoned, b"half").unwrap();
    server.put("3.tar", &content(3));
    read_with(&sources, &server.url("3.tar")).unwrap();
    assert!(!abandoned.exists() && kept(folder.path()).len() == 3);
}

#[test]
fn many_share_a_cache_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let server = FileServer::start();
    (0..4).for_each(|number| server.put(&format!("{number}.tar"), &content(number)));
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (folder, server) = (folder.path(), &server);
            scope.spawn(move || {
                // Each its own, as in processes: locks belong to open files.
                let sources = cached(folder, 2 * SIZE);
                for round in 0..12 {
                    let number = (reader + round) % 4;
                    assert!(read_with(&sources, &server.url(&format!("{number}.tar"))).unwrap() == content(number));
                }
            });
        }
    });
    let kept = kept(folder.path());
    assert!(kept.len() <= 2 && kept.iter().all(|name| name.ends_with(".shard")), "{kept:?}");
}

#[test]
fn tar_is_kept_whole_though_its_readers_stop_at_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut tar = tar_of(&[("a.jpg", &content(0))]);
    tar.resize(tar.len() + 9 * 1024, 0);
    let (server, url) = serving(&tar);
    for reads in [tar.len().div_ceil(1000), 0] {
        let sources = cached(folder.path(), 1 << 20);
        let stream = sources.open(&url, || false).unwrap();
        let end = read_shard(stream, &Bitmap::default(), |_| std::ops::ControlFlow::Continue(()));
        assert_eq!((end.unwrap().num_samples, num_reads(&server)), (1, reads));
    }
}

#[test]
fn object_is_read_as_it_is_from_a_byte_on_with_a_token_for_its_server_alone() {
    let (server, store) = (FileServer::start(), FileServer::start());
    let bytes = content(3);
    server.set_habits(Habits { token: Some(Some("secret")), ..Habits::default() });
    store.set_habits(Habits { token: Some(None), fails_every: Some((3, Fault::CutAfter(10))), ..Habits::default() });
    store.put("there", &bytes);
    server.redirect("here", &store.url("there"));
    let read = |sources: &Sources, start: u64| {
        let mut stream = sources.open_as_it_is(&server.url("here"), start, || false)?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        stream.halt().check().map(|()| rest)
    };
    let known = Sources::new(SourceOptions { immutable: true, ..options() }).with_token("secret");
    for start in [0, 1, 999, 1000, 5_500, SIZE as u64 - 1] {
        assert_eq!(read(&known, start).unwrap(), bytes[start as usize..], "{start}");
    }
    let refused = store_error(read(&Sources::new(options()), 0));
    assert!(refused.denied && refused.reason == "the server answers 401 Unauthorized", "{refused}");
    assert!(matches!(read(&Sources::default().with_token("a\nb"), 0), Err(Error::Network(_))));
}
