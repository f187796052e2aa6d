//! Undoing compression, told by the first bytes of a stream whatever its name.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::errors::FrameDecoderError;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// Streams are read in pieces of this many bytes.
const READ_BYTES: usize = 256 << 10;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Zstandard's frames of data for others, which a decoder passes over: `184D2A5?`, little-endian.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];

/// A frame that refers back further is refused, as by zstd itself unless it is told otherwise: all of it is held in memory.
const MAX_WINDOW_BYTES: u64 = 128 << 20;

/// Gives the tar in `stream`: plain, gzip or zstd, the latter two in any number of parts.
///
/// Errors: those of the first read; a header that cannot be read.
pub fn decompress<'a>(mut stream: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut start = Vec::with_capacity(ZSTD.len());
    stream.by_ref().take(ZSTD.len() as u64).read_to_end(&mut start)?;
    let is_gzip = start.starts_with(&GZIP);
    let is_zstd = start == ZSTD || is_skippable(&start);
    let whole = BufReader::with_capacity(READ_BYTES, Cursor::new(start).chain(stream));
    if is_gzip {
        Ok(Box::new(Guarded { decoder: MultiGzDecoder::new(whole), has_panicked: false }))
    } else if is_zstd {
        let decoder = Zstd { source: whole, decoder: FrameDecoder::new(), is_within_frame: false };
        Ok(Box::new(Guarded { decoder, has_panicked: false }))
    } else {
        Ok(Box::new(whole))
    }
}

/// Reads all frames of a zstd stream.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    is_within_frame: bool,
}

impl<R: BufRead> Zstd<R> {
    /// Goes to the next frame that holds data; false at the end of the stream.
    fn begin_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            if let Some(header) = self.read_header()? {
                // One that has read a frame before allows the next a smaller window than the first.
                self.decoder = FrameDecoder::new();
                self.decoder.init(&header[..]).map_err(damaged)?;
                self.is_within_frame = true;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The header of a frame; `None` if the frame is for others, and passed over.
    ///
    /// The decoder takes any window on its word.
    ///
    /// Source: RFC 8878, sections 3.1.1.1 and 3.1.2.
    fn read_header(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut start = [0; 5];
        self.source.read_exact(&mut start[..4])?;
        if is_skippable(&start[..4]) {
            let mut length = [0; 4];
            self.source.read_exact(&mut length)?;
            let length = u32::from_le_bytes(length).into();
            let skipped = io::copy(&mut self.source.by_ref().take(length), &mut io::sink())?;
            return if skipped < length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(None) };
        }
        if start[..4] != ZSTD {
            return Err(invalid("what follows a frame is none"));
        }
        self.source.read_exact(&mut start[4..])?;
        let descriptor = start[4];
        let is_single_segment = descriptor & 0x20 != 0;
        let window_len = usize::from(!is_single_segment);
        let dictionary_len = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let size_len = [usize::from(is_single_segment), 2, 4, 8][usize::from(descriptor >> 6)];
        let mut rest = vec![0; window_len + dictionary_len + size_len];
        self.source.read_exact(&mut rest)?;
        let window = if is_single_segment {
            let size = rest[dictionary_len..].iter().rev().fold(0, |size, &byte| size << 8 | u64::from(byte));
            size.saturating_add(if size_len == 2 { 256 } else { 0 })
        } else {
            let base = 1 << (10 + (rest[0] >> 3));
            base + base / 8 * u64::from(rest[0] & 7)
        };
        if window > MAX_WINDOW_BYTES {
            return Err(invalid(&format!("a window of {window} bytes, more than {MAX_WINDOW_BYTES}: compress with --long=27 at most")));
        }
        Ok(Some([&start[..], &rest].concat()))
    }

    /// Compares a frame that has been read to its end with its checksum, if it has one.
    fn check_frame(&self) -> io::Result<()> {
        match self.decoder.get_checksum_from_data() {
            Some(told) if self.decoder.get_calculated_checksum() != Some(told) => Err(invalid("what was read does not fit its checksum")),
            _ => Ok(()),
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !buf.is_empty() && (self.is_within_frame || self.begin_frame()?) {
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder.decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBytes(buf.len())).map_err(damaged)?;
            }
            let len = self.decoder.read(buf)?;
            if len > 0 {
                return Ok(len);
            }
            self.is_within_frame = false;
            self.check_frame()?;
        }
        Ok(0)
    }
}

fn is_skippable(start: &[u8]) -> bool {
    start.len() == 4 && start[0] & 0xf0 == 0x50 && start[1..] == ZSTD_SKIPPABLE
}

fn damaged(error: FrameDecoderError) -> io::Error {
    invalid(&error.to_string())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("zstd: {what}"))
}

/// Makes of a decoder that panics one that fails: bytes which make it do so are damaged ones, and no reason to end a job.
struct Guarded<R> {
    decoder: R,
    has_panicked: bool,
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if !self.has_panicked {
            // It is not used again once it has panicked, whatever state it is in.
            match catch_unwind(AssertUnwindSafe(|| self.decoder.read(buf))) {
                Ok(read) => return read,
                Err(_) => self.has_panicked = true,
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the decoder panicked"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn undo(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        decompress(bytes)?.read_to_end(&mut all)?;
        Ok(all)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    /// More than a window, and not only zeros.
    fn text() -> Vec<u8> {
        (0..400_000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect()
    }

    #[test]
    fn plain_gzip_and_zstd_are_told_by_their_first_bytes() {
        let text = text();
        for compressed in [text.clone(), gzip(&text), zstd(&text)] {
            assert!(undo(&compressed).unwrap() == text);
        }
        for short in [&b""[..], b"a", b"abc"] {
            assert_eq!(undo(short).unwrap(), short);
        }
    }

    #[test]
    fn streams_of_several_parts_are_read_to_their_end() {
        let text = text();
        let (first, second) = text.split_at(1_000_001);
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        assert!(undo(&[gzip(first), gzip(second)].concat()).unwrap() == text);
        assert!(undo(&[skippable.clone(), zstd(first), skippable, zstd(b""), zstd(second)].concat()).unwrap() == text);
    }

    #[test]
    fn zstd_itself_is_read() {
        // printf 'peapod peapod peapod peapod' | zstd -19 --check, version 1.5.
        let by_zstd = [
            0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x68, 0x6d, 0x00, 0x00, 0x38, 0x70, 0x65, 0x61, 0x70, 0x6f, 0x64, 0x20, 0x01, 0x00, 0xa2, 0x8b,
            0x11, 0x12, 0x52, 0x0c, 0x62,
        ];
        assert_eq!(undo(&by_zstd).unwrap(), b"peapod peapod peapod peapod");
        assert_eq!(
            undo(&[&by_zstd[..], &zstd(b" x"), &by_zstd].concat()).unwrap(),
            b"peapod peapod peapod peapod xpeapod peapod peapod peapod"
        );
        // A byte of the text, and one of its checksum.
        for place in [11, by_zstd.len() - 1] {
            let mut damaged = by_zstd;
            damaged[place] ^= 1;
            assert!(undo(&damaged).unwrap_err().to_string().contains("does not fit its checksum"), "{place}");
        }
    }

    #[test]
    fn stream_that_breaks_off_or_is_damaged_is_an_error() {
        let compressed = zstd(&text());
        assert!(undo(&compressed[..compressed.len() / 2]).is_err());
        assert!(undo(&[zstd(b"abc"), b"no frame".to_vec()].concat()).unwrap_err().to_string().starts_with("zstd: "));
    }

    /// A frame of this text, uncompressed, with a window of `(8 + mantissa) / 8 * 2^(10 + exponent)` bytes.
    fn frame(exponent: u8, mantissa: u8, text: &[u8]) -> Vec<u8> {
        let block = ((text.len() as u32) << 3 | 1).to_le_bytes();
        [&ZSTD[..], &[0, exponent << 3 | mantissa], &block[..3], text].concat()
    }

    #[test]
    fn window_of_128_mib_is_the_largest() {
        let largest = [frame(17, 0, b"abc"), frame(17, 0, b"def"), frame(0, 0, b"ghi")].concat();
        assert_eq!(undo(&largest).unwrap(), b"abcdefghi", "also in the frames after the first");
        let single_segment = |size: u64| [&ZSTD[..], &[0xe0], &size.to_le_bytes(), &[1, 0, 0]].concat();
        for (too_large, window) in [
            (frame(17, 1, b"abc"), 150_994_944_u64),
            (frame(31, 7, b"abc"), 4_123_168_604_160),
            (single_segment(134_217_729), 134_217_729),
            (single_segment(u64::MAX), u64::MAX),
        ] {
            let error = undo(&too_large).unwrap_err().to_string();
            assert!(error.starts_with(&format!("zstd: a window of {window} bytes, more than 134217728")), "{error}");
        }
    }

    #[test]
    fn decoder_that_panics_is_an_error_from_then_on() {
        struct Panics;
        impl Read for Panics {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("a test's");
            }
        }
        let mut decoder = Guarded { decoder: Panics, has_panicked: false };
        for _ in 0..2 {
            assert_eq!(decoder.read(&mut [0; 4]).unwrap_err().to_string(), "the decoder panicked");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(mut bytes in proptest::collection::vec(any::<u8>(), 0..512), kind in 0..3) {
            match kind {
                0 => bytes.splice(..0, GZIP).for_each(drop),
                1 => bytes.splice(..0, ZSTD).for_each(drop),
                _ => {}
            }
            let _ = undo(&bytes);
        }
    }
}
