//! Undoing compression, told by the first bytes of a stream whatever its name.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// Streams are read in pieces of this many bytes.
const READ_BYTES: usize = 256 << 10;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Zstandard's frames of data for others, which a decoder passes over: `184D2A5?`, little-endian.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];

/// Gives the tar in `stream`: plain, gzip or zstd, the latter two in any number of parts.
///
/// Errors: those of the first read; a header that cannot be read.
pub fn decompress<'a>(mut stream: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut start = Vec::with_capacity(ZSTD.len());
    stream.by_ref().take(ZSTD.len() as u64).read_to_end(&mut start)?;
    let is_gzip = start.starts_with(&GZIP);
    let is_zstd = start == ZSTD || (start.len() == 4 && start[0] & 0xf0 == 0x50 && start[1..] == ZSTD_SKIPPABLE);
    let whole = BufReader::with_capacity(READ_BYTES, Cursor::new(start).chain(stream));
    if is_gzip {
        Ok(Box::new(MultiGzDecoder::new(whole)))
    } else if is_zstd {
        Ok(Box::new(Zstd { source: whole, decoder: FrameDecoder::new(), is_within_frame: false }))
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
            match self.decoder.init(&mut self.source) {
                Ok(()) => {
                    self.is_within_frame = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let skipped = io::copy(&mut self.source.by_ref().take(length.into()), &mut io::sink())?;
                    if skipped < u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(damaged(error)),
            }
        }
        Ok(false)
    }

    /// Compares a frame that has been read to its end with its checksum, if it has one.
    fn check_frame(&self) -> io::Result<()> {
        match self.decoder.get_checksum_from_data() {
            Some(told) if self.decoder.get_calculated_checksum() != Some(told) => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "zstd: what was read does not fit its checksum"))
            }
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

fn damaged(error: FrameDecoderError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("zstd: {error}"))
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
