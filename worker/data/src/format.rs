//! What a picture's bytes are: JPEG, as shards have it, or something else under its name; and which way up.

use std::io::Cursor;

use ::image::codecs::png::PngDecoder;
use ::image::metadata::Orientation;
use ::image::{ColorType, DynamicImage, ImageDecoder, Limits, RgbImage};

use crate::image::{self, MAX_PIXELS, Rgb};
use crate::{Error, Result};

/// The format of a picture, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Also what is not recognised: the JPEG decoder says what is wrong with it.
    Jpeg,
    /// Read too: some downloaders keep the bytes and change the name.
    Png,
    /// Not read.
    Other(&'static str),
}

/// First bytes of formats that are often found under the name `.jpg`; `None` stands for any byte.
const KNOWN: &[(&str, &[Option<u8>])] = &[
    ("GIF", &[Some(b'G'), Some(b'I'), Some(b'F'), Some(b'8')]),
    ("BMP", &[Some(b'B'), Some(b'M')]),
    ("TIFF", &[Some(b'I'), Some(b'I'), Some(42), Some(0)]),
    ("TIFF", &[Some(b'M'), Some(b'M'), Some(0), Some(42)]),
    ("JPEG XL", &[Some(0xff), Some(0x0a)]),
    ("HTML or XML", &[Some(b'<')]),
];

impl Format {
    /// The format of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let begins = |pattern: &[Option<u8>]| {
            bytes.len() >= pattern.len() && pattern.iter().zip(bytes).all(|(wanted, byte)| wanted.is_none_or(|wanted| wanted == *byte))
        };
        let tagged = |at: usize, tag: &[u8]| bytes.get(at..at + tag.len()) == Some(tag);
        if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            Self::Png
        } else if tagged(0, b"RIFF") && tagged(8, b"WEBP") {
            Self::Other("WebP")
        } else if tagged(4, b"ftyp") {
            Self::Other(if tagged(8, b"avif") || tagged(8, b"avis") { "AVIF" } else { "HEIF" })
        } else if tagged(4, b"jP  ") {
            Self::Other("JPEG 2000")
        } else {
            KNOWN.iter().find(|(_, pattern)| begins(pattern)).map_or(Self::Jpeg, |(name, _)| Self::Other(name))
        }
    }
}

/// Reads width and height from a PNG's header.
///
/// Errors: [`Error::Picture`], [`Error::PictureSize`]; none with 16 bits a channel is read.
pub fn png_size(png: &[u8]) -> Result<(u32, u32)> {
    open_png(png).map(|decoder| decoder.dimensions())
}

/// Decodes a PNG. What is transparent in it shows the colour that lies under it, as Pillow's conversion to RGB.
///
/// Errors: as [`png_size`], and [`Error::Picture`] if it is damaged.
pub fn decode_png(png: &[u8]) -> Result<Rgb> {
    let picture = DynamicImage::from_decoder(open_png(png)?).map_err(|error| unreadable(&error))?.into_rgb8();
    Ok(Rgb { width: picture.width(), height: picture.height(), bytes: picture.into_raw() })
}

fn open_png(png: &[u8]) -> Result<PngDecoder<Cursor<&[u8]>>> {
    let mut limits = Limits::default();
    // Its own buffers: a row, and what the text chunks before the pixels hold.
    limits.max_alloc = Some(64 << 20);
    let decoder = PngDecoder::with_limits(Cursor::new(png), limits).map_err(|error| unreadable(&error))?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(Error::PictureSize { width, height, limit: MAX_PIXELS });
    }
    match decoder.color_type() {
        ColorType::L8 | ColorType::La8 | ColorType::Rgb8 | ColorType::Rgba8 => Ok(decoder),
        _ => Err(Error::Picture("a PNG with 16 bits a channel; save it with 8".into())),
    }
}

fn unreadable(error: &::image::ImageError) -> Error {
    Error::Picture(error.to_string())
}

/// How a decoded picture is turned to be seen the right way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn(Orientation);

impl Turn {
    /// Not at all.
    pub const NONE: Self = Self(Orientation::NoTransforms);

    /// Width and height after turning.
    #[must_use]
    pub fn size(self, (width, height): (u32, u32)) -> (u32, u32) {
        match self.0 {
            Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH => (height, width),
            _ => (width, height),
        }
    }

    /// Turns a picture.
    #[must_use]
    pub fn apply(self, picture: Rgb) -> Rgb {
        let Rgb { width, height, bytes } = picture;
        if self == Self::NONE {
            return Rgb { width, height, bytes };
        }
        // A buffer of another length than its size says cannot be made by the decoders; it would give an empty picture, which `cover`
        // refuses.
        let mut picture = DynamicImage::ImageRgb8(RgbImage::from_raw(width, height, bytes).unwrap_or_default());
        picture.apply_orientation(self.0);
        let picture = picture.into_rgb8();
        Rgb { width: picture.width(), height: picture.height(), bytes: picture.into_raw() }
    }
}

/// How a JPEG's EXIF data says that it is turned; not at all if they say nothing.
#[must_use]
pub fn turn(jpeg: &[u8]) -> Turn {
    image::exif(jpeg).and_then(|exif| Orientation::from_exif_chunk(&exif)).map_or(Turn::NONE, Turn)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use ::image::{DynamicImage, ImageFormat};

    use super::*;
    use crate::image::{decode, size};
    use crate::testing::jpeg_of;

    fn png(picture: &DynamicImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn formats_under_the_wrong_name_are_named() {
        let webp = b"RIFF\x10\0\0\0WEBPVP8 ".as_slice();
        for (bytes, wanted) in [
            (webp, "WebP"),
            (b"GIF89a", "GIF"),
            (b"BM1234", "BMP"),
            (b"II*\0", "TIFF"),
            (b"MM\0*", "TIFF"),
            (b"\0\0\0\x1cftypavif", "AVIF"),
            (b"\0\0\0\x1cftypheic", "HEIF"),
            (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
            (b"\xff\x0a", "JPEG XL"),
            (b"<!DOCTYPE html>", "HTML or XML"),
        ] {
            assert_eq!(Format::of(bytes), Format::Other(wanted));
            for error in [size(bytes).unwrap_err(), decode(bytes).unwrap_err()] {
                assert_eq!(error.to_string(), format!("jpg: this is {wanted}; JPEG and PNG are read"));
            }
        }
        for bytes in [jpeg_of(8, 8, [0; 3]).as_slice(), b"", b"R", b"some text"] {
            assert_eq!(Format::of(bytes), Format::Jpeg);
        }
    }

    #[test]
    fn png_under_the_name_of_a_jpeg_is_read() {
        let rgba = ::image::RgbaImage::from_fn(5, 3, |x, y| ::image::Rgba([x as u8 * 40, y as u8 * 70, 9, 0]));
        let bytes = png(&rgba.clone().into());
        assert_eq!(size(&bytes).unwrap(), (5, 3));
        let picture = decode(&bytes).unwrap();
        let wanted: Vec<u8> = rgba.pixels().flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
        assert_eq!((picture.width, picture.height, picture.bytes), (5, 3, wanted), "the colour under what is transparent");

        let gray = ::image::GrayImage::from_fn(2, 1, |x, _| ::image::Luma([x as u8 * 200]));
        assert_eq!(decode(&png(&gray.into())).unwrap().bytes, [0, 0, 0, 200, 200, 200]);
        for part in [9, 20, bytes.len() / 2, bytes.len() - 20] {
            assert!(decode(&bytes[..part]).is_err(), "cut at {part} of {}", bytes.len());
        }
    }

    #[test]
    fn png_of_16_bits_or_too_many_pixels_is_refused_before_it_is_decoded() {
        for deep in [DynamicImage::new_rgb16(4, 4), DynamicImage::new_luma16(4, 4)] {
            let error = size(&png(&deep)).unwrap_err().to_string();
            assert!(error.contains("16 bits a channel"), "{error}");
        }
        // 60000 x 60000 of zeros is a few hundred bytes; the header alone says so.
        let mut bomb = png(&DynamicImage::new_luma8(8, 8));
        bomb[16..24].copy_from_slice(&[60_000_u32.to_be_bytes(), 60_000_u32.to_be_bytes()].concat());
        let crc = crc32(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.to_be_bytes());
        for error in [size(&bomb).unwrap_err(), decode(&bomb).unwrap_err()] {
            assert!(matches!(error, Error::PictureSize { width: 60_000, height: 60_000, .. }), "{error}");
        }
    }

    /// PNG's checksum of a chunk.
    fn crc32(bytes: &[u8]) -> u32 {
        let step = |crc: u32, byte: &u8| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
        };
        !bytes.iter().fold(u32::MAX, step)
    }

    #[test]
    fn turns_change_the_size_as_they_change_the_picture() {
        let picture = Rgb { width: 3, height: 1, bytes: vec![1, 1, 1, 2, 2, 2, 3, 3, 3] };
        let firsts = |turn: Turn| turn.apply(picture.clone()).bytes.iter().step_by(3).copied().collect::<Vec<_>>();
        for (orientation, size, wanted) in [(1, (3, 1), [1, 2, 3]), (3, (3, 1), [3, 2, 1]), (6, (1, 3), [1, 2, 3]), (8, (1, 3), [3, 2, 1])]
        {
            let turn = Turn(Orientation::from_exif(orientation).unwrap());
            let turned = turn.apply(picture.clone());
            assert_eq!((turn.size((3, 1)), (turned.width, turned.height), firsts(turn)), (size, size, wanted.to_vec()), "{orientation}");
        }
    }
}
