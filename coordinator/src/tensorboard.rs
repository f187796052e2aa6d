//! Event files for TensorBoard, in `--state-dir/tensorboard`.
//!
//! A file is a list of records: length, its checksum, bytes, their checksum. The bytes are an `Event` of TensorFlow's event.proto, of which
//! the few fields that are used here are written down below.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use peapod_proto::ids::Step;
use prost::Message;

use crate::logs::unix_now;

/// How long what was written may stay in memory.
const FLUSH_EVERY: std::time::Duration = std::time::Duration::from_secs(1);

/// One moment: of a run, of a step, or with numbers.
#[derive(Clone, PartialEq, prost::Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// A start (status 1) makes readers drop what they know of its step and later ones.
#[derive(Clone, PartialEq, prost::Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "Content", tags = "2, 4")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Simple(f32),
    #[prost(message, tag = "4")]
    Image(Image),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    /// 3 is RGB.
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded: Vec<u8>,
}

const SESSION_START: i32 = 1;
const RGB: i32 = 3;

/// Writes one event file.
#[derive(Debug)]
pub struct EventFile {
    file: BufWriter<File>,
    flushed: Instant,
}

impl EventFile {
    /// Begins a new file in `folder` for a run that goes on from `step`; readers forget later steps of older files.
    ///
    /// # Errors
    /// From the folder.
    pub fn create(folder: &Path, step: Step) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let (seconds, pid) = (unix_now() as u64, std::process::id());
        // Readers take the files in the order of their names.
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.peapod.{pid}"));
        let file = File::create(path)?;
        let mut events = Self { file: BufWriter::new(file), flushed: Instant::now() };
        events.write(0, What::FileVersion("brain.Event:2".into()))?;
        events.go_back_to(step)?;
        Ok(events)
    }

    /// Steps behind this one are void: they will come again.
    ///
    /// # Errors
    /// From the file.
    pub fn go_back_to(&mut self, step: Step) -> io::Result<()> {
        self.write(step.0 + 1, What::SessionLog(SessionLog { status: SESSION_START }))?;
        self.file.flush()
    }

    /// Numbers of a step, by name.
    ///
    /// # Errors
    /// From the file.
    pub fn scalars(&mut self, step: Step, scalars: &[(&str, f64)]) -> io::Result<()> {
        let value = |&(tag, number): &(&str, f64)| Value { tag: tag.into(), content: Some(Content::Simple(number as f32)) };
        self.write(step.0, What::Summary(Summary { value: scalars.iter().map(value).collect() }))?;
        if self.flushed.elapsed() >= FLUSH_EVERY {
            self.file.flush()?;
            self.flushed = Instant::now();
        }
        Ok(())
    }

    /// A picture by the weights of a step. Passes over what has no PNG header.
    ///
    /// # Errors
    /// From the file.
    pub fn picture(&mut self, step: Step, tag: &str, png: &[u8]) -> io::Result<()> {
        // Signature, length and name of the first chunk, then width and height.
        let side = |at: usize| png.get(at..at + 4).and_then(|bytes| Some(i32::from_be_bytes(bytes.try_into().ok()?)));
        let (Some(width), Some(height)) = (side(16), side(20)) else { return Ok(()) };
        let image = Image { height, width, colorspace: RGB, encoded: png.to_vec() };
        self.write(step.0, What::Summary(Summary { value: vec![Value { tag: tag.into(), content: Some(Content::Image(image)) }] }))?;
        self.file.flush()
    }

    fn write(&mut self, step: u64, what: What) -> io::Result<()> {
        let event = Event { wall_time: unix_now(), step: step as i64, what: Some(what) };
        let bytes = event.encode_to_vec();
        let length = (bytes.len() as u64).to_le_bytes();
        self.file.write_all(&length)?;
        self.file.write_all(&masked(&length).to_le_bytes())?;
        self.file.write_all(&bytes)?;
        self.file.write_all(&masked(&bytes).to_le_bytes())
    }
}

impl Drop for EventFile {
    fn drop(&mut self) {
        // These files explain a run; what they lack at its end nobody can be told any more.
        let _ = self.file.flush();
    }
}

/// The checksum of a record: turned and shifted, so that the checksum of data with checksums in it stays a good one.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_back(folder: &Path) -> Vec<Event> {
        let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let bytes = std::fs::read(paths.pop().unwrap()).unwrap();
        assert!(paths.is_empty());
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(word(8), masked(&rest[..8]));
            assert_eq!(word(12 + length), masked(&rest[12..12 + length]));
            events.push(Event::decode(&rest[12..12 + length]).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn checksum_is_the_one_of_the_format() {
        // "123456789" is the check value of CRC-32C: 0xe3069283; masked by hand.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked(b"123456789"), 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path(), Step(4)).unwrap();
        events.scalars(Step(5), &[("loss/task", 0.5), ("learning_rate", 1e-3)]).unwrap();
        let mut png = Vec::new();
        png.extend_from_slice(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x40\0\0\0\x20rest");
        events.picture(Step(5), "pictures/00", &png).unwrap();
        events.picture(Step(5), "pictures/01", b"\x89PNG").unwrap();
        drop(events);
        let events = read_back(folder.path());
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!((events[1].step, &events[1].what), (5, &Some(What::SessionLog(SessionLog { status: 1 }))));
        let Some(What::Summary(scalars)) = &events[2].what else { panic!("{:?}", events[2]) };
        assert_eq!((scalars.value[0].tag.as_str(), &scalars.value[0].content), ("loss/task", &Some(Content::Simple(0.5))));
        assert_eq!(scalars.value.len(), 2);
        let Some(What::Summary(picture)) = &events[3].what else { panic!("{:?}", events[3]) };
        let Some(Content::Image(image)) = &picture.value[0].content else { panic!("{picture:?}") };
        assert_eq!((image.width, image.height, &image.encoded), (64, 32, &png));
        assert_eq!(events.len(), 4);
    }
}
