//! Pictures: JPEG bytes to the RGB crop a model sees.

mod markers;
mod room;

use std::panic::catch_unwind;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::bucket::{Bucket, covering_size};
use crate::draws::SampleRng;
use crate::format::{self, Format, Turn};
use crate::{Error, Result};
use markers::{Layout, tidied, without_trailing_segments};
use room::ROOM;

/// A picture with more pixels is not decoded: a few bytes of header can claim gigabytes. Enough for any camera.
pub const MAX_PIXELS: u64 = 1 << 26;

type Decoder<'a> = JpegDecoder<ZCursor<&'a [u8]>>;

/// A picture as three bytes a pixel, red first, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// `width * height * 3` bytes.
    pub bytes: Vec<u8>,
}

/// A crop of a scaled picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cropped {
    /// RGB, `[height, width, 3]` of the bucket.
    pub pixels: Vec<u8>,
    /// Where its corner lies in the scaled picture, `(y, x)`.
    pub corner: (u32, u32),
}

/// Reads width and height from the header of a JPEG, or of a PNG under its name.
///
/// Errors: [`Error::Picture`] if it is neither, [`Error::PictureFormat`] if it is something else that is known, [`Error::PictureSize`]
/// beyond [`MAX_PIXELS`].
pub fn size(jpeg: &[u8]) -> Result<(u32, u32)> {
    guarded(|| match Format::of(jpeg) {
        Format::Jpeg => open(jpeg, |_, _, size| Ok(size)),
        Format::Png => format::png_size(jpeg),
        Format::Other(name) => Err(Error::PictureFormat(name)),
    })
}

/// The EXIF data of a JPEG, if there are any.
pub(crate) fn exif(jpeg: &[u8]) -> Option<Vec<u8>> {
    guarded(|| open(jpeg, |decoder, _, _| Ok(decoder.exif().cloned()))).ok().flatten()
}

/// Decodes a JPEG, or a PNG under its name; grayscale and CMYK become RGB. A rotation noted in its EXIF data is ignored, as by Pillow:
/// [`Turn::apply`] is for that.
///
/// A picture whose bytes end too soon, or make no sense, is refused rather than filled up with grey. Not all damage shows: what is cut and
/// has an end marker (`ff d9`) behind the cut is filled up, and bits that are others are other pixels. Pillow takes such pictures, too.
///
/// Errors: as [`size`].
pub fn decode(jpeg: &[u8]) -> Result<Rgb> {
    guarded(|| {
        match Format::of(jpeg) {
            Format::Jpeg => {}
            Format::Png => return format::decode_png(jpeg),
            Format::Other(name) => return Err(Error::PictureFormat(name)),
        }
        open(jpeg, |mut decoder, jpeg, (width, height)| {
            let layout = Layout::of(jpeg);
            if is_misread(&decoder, &layout) {
                return decode_at(jpeg, &layout, (width, height), 1);
            }
            let bytes = decoder.decode().or_else(|error| {
                let ended = if layout.is_in_several_scans() { None } else { without_trailing_segments(jpeg) };
                ended.map_or(Err(error), |ended| read_header(&ended)?.decode())
            });
            let bytes = bytes.map_err(|error| Error::Picture(error.to_string()))?;
            let expected = u64::from(width) * u64::from(height) * 3;
            if bytes.len() as u64 != expected {
                return Err(Error::Picture(format!("{} bytes of pixels where {expected} were expected", bytes.len())));
            }
            Ok(Rgb { width, height, bytes })
        })
    })
}

/// Decodes a JPEG of `size` that is to be scaled down to `bucket`: to a half, a quarter or an eighth of its size where that leaves at least
/// twice the pixels that are needed, along both sides. Where it does not, or the JPEG is of a kind that gains nothing, as [`decode`] does.
///
/// To a half of its size, by leaving out the higher frequencies of its 8 x 8 blocks, a picture of 12 megapixels costs a fifth less.
/// Scaled to its bucket it then differs from one that was decoded whole by 0.2 grey levels on average (BENCHMARKS.md).
///
/// Returns the picture and what its size was divided by; a fraction of a pixel at the right and lower edges is filled up.
///
/// Errors: as [`decode`].
pub fn decode_shrunk(jpeg: &[u8], size: (u32, u32), bucket: Bucket) -> Result<(Rgb, u32)> {
    let scaled = covering_size(size, bucket);
    let leaves_enough =
        |by: u32| [(size.0, scaled.0), (size.1, scaled.1)].iter().all(|&(have, need)| u64::from(have) >= 2 * need * u64::from(by));
    let shrunk = [8, 4, 2].into_iter().find(|&by| leaves_enough(by)).map(|by| {
        let layout = Layout::of(jpeg);
        guarded(|| Ok((decode_at(jpeg, &layout, size, by)?, by)))
    });
    match shrunk {
        Some(Ok(shrunk)) => Ok(shrunk),
        // Also where the shrinking decoder stumbled: what is wrong with a picture is for one decoder to say.
        _ => Ok((decode(jpeg)?, 1)),
    }
}

/// Whether the decoder, which has read the header, would make garbage of the picture and say nothing: it mixes up components that come in
/// scans of their own, takes luma for the finest of them, and judges by fewer markers than libjpeg what the colours are.
fn is_misread(decoder: &Decoder<'_>, layout: &Layout) -> bool {
    // With three components it takes CMYK, which is what Adobe's marker says, for RGB.
    let is_rgb = matches!(decoder.input_colorspace(), Some(ColorSpace::RGB | ColorSpace::CMYK));
    let has_other_colours = decoder.info().is_some_and(|info| info.components == 3) && is_rgb != layout.is_rgb();
    layout.is_in_several_scans() || layout.is_first_coarser() || has_other_colours
}

/// A JPEG at one `by`-th of its size, by the other decoder.
///
/// Errors: [`Error::Picture`], also where it has no three components, or is not decoded faster than whole.
fn decode_at(jpeg: &[u8], layout: &Layout, (width, height): (u32, u32), by: u32) -> Result<Rgb> {
    let damaged = |error: jpeg_decoder::Error| Error::Picture(error.to_string());
    let unusual = |what: &str| Error::Picture(format!("{what} is not decoded"));
    let wanted = (width.div_ceil(by), height.div_ceil(by));
    let mut decoder = jpeg_decoder::Decoder::new(jpeg);
    decoder.read_info().map_err(damaged)?;
    let info = decoder.info().ok_or_else(|| unusual("a JPEG without a header"))?;
    // Grey ones are never misread, and of neither there are many.
    if info.pixel_format != jpeg_decoder::PixelFormat::RGB24 {
        return Err(unusual("a grey or CMYK JPEG of this kind"));
    }
    // It would take more blocks from a scan than there are.
    if layout.is_in_several_scans() && !layout.has_plain_sampling() {
        return Err(unusual("a JPEG of several scans with this sampling"));
    }
    // All scans of a progressive picture have to be read first, which the usual decoder does in less time.
    if by > 1 && info.coding_process != jpeg_decoder::CodingProcess::DctSequential {
        return Err(unusual("a progressive JPEG at a part of its size"));
    }
    let too_large = |_| unusual("a picture of this size");
    let (wide, high) = (u16::try_from(wanted.0).map_err(too_large)?, u16::try_from(wanted.1).map_err(too_large)?);
    let given = decoder.scale(wide, high).map_err(damaged)?;
    let transform = if layout.is_rgb() { jpeg_decoder::ColorTransform::RGB } else { jpeg_decoder::ColorTransform::YCbCr };
    decoder.set_color_transform(transform);
    let bytes = decoder.decode().map_err(damaged)?;
    if given != (wide, high) || bytes.len() as u64 != 3 * u64::from(wide) * u64::from(high) {
        return Err(Error::Picture(format!("{} bytes of pixels, {given:?}, where {wanted:?} was expected", bytes.len())));
    }
    Ok(Rgb { width: wanted.0, height: wanted.1, bytes })
}

/// Scales a picture so that it just covers the bucket, then cuts out the bucket's size where `rng` says.
///
/// Bilinear and antialiased as Pillow's `Image.resize` on 8 bits: within one grey level of it. Only the crop is computed, so that a thin
/// picture, which would become very long, costs no more than another.
///
/// Errors: [`Error::Picture`] if the picture has no pixels.
pub fn cover(resizer: &mut Resizer, picture: &Rgb, bucket: Bucket, rng: &SampleRng) -> Result<Cropped> {
    cover_shrunk(resizer, picture, (picture.width, picture.height), 1, bucket, rng)
}

/// What a model is shown of a picture: decodes it, turns it, and cuts a bucket out of it where `rng` says. With `fast_shrink`, as
/// [`decode_shrunk`] does. `size` is the turned picture's. Waits where other threads decode very large pictures.
///
/// Errors: as [`decode`].
pub fn cut(
    resizer: &mut Resizer,
    jpeg: &[u8],
    turn: Turn,
    size: (u32, u32),
    bucket: Bucket,
    fast_shrink: bool,
    rng: &SampleRng,
) -> Result<Cropped> {
    let _room = ROOM.take(size);
    // What a shrunk picture lacks at its right and lower edges would lie elsewhere once it is turned.
    let (picture, by) = match fast_shrink && turn == Turn::NONE {
        true => decode_shrunk(jpeg, size, bucket)?,
        false => (turn.apply(decode(jpeg)?), 1),
    };
    cover_shrunk(resizer, &picture, size, by, bucket, rng)
}

/// [`cover`] for a picture of `size` of which [`decode_shrunk`] gave one `by`-th: the same crop.
pub fn cover_shrunk(resizer: &mut Resizer, picture: &Rgb, size: (u32, u32), by: u32, bucket: Bucket, rng: &SampleRng) -> Result<Cropped> {
    let unusable = |error: &dyn std::fmt::Display| Error::Picture(error.to_string());
    let scaled = covering_size(size, bucket);
    let slack = (scaled.1.saturating_sub(bucket.height.into()), scaled.0.saturating_sub(bucket.width.into()));
    let (y, x) = rng.crop(slack);
    let corner = u32::try_from(y).and_then(|y| Ok((y, u32::try_from(x)?))).map_err(|error| unusable(&error))?;

    // Not the shrunk picture's own sides, which are rounded up.
    let (source_width, source_height) = (f64::from(size.0) / f64::from(by), f64::from(size.1) / f64::from(by));
    let (left, width) = source_span(source_width, scaled.0, x, bucket.width);
    let (top, height) = source_span(source_height, scaled.1, y, bucket.height);
    let source = ImageRef::new(picture.width, picture.height, &picture.bytes, PixelType::U8x3).map_err(|error| unusable(&error))?;
    let mut target = Image::new(bucket.width, bucket.height, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).crop(left, top, width, height);
    resizer.resize(&source, &mut target, &options).map_err(|error| unusable(&error))?;
    Ok(Cropped { pixels: target.into_vec(), corner })
}

/// The stretch of the source, start and length in its pixels, that `target_len` pixels from `start` of its scaled version show.
fn source_span(source_len: f64, scaled_len: u64, start: u64, target_len: u32) -> (f64, f64) {
    let scale = source_len / scaled_len as f64;
    let from = (start as f64 * scale).min(source_len);
    // Rounding must not carry the end past the picture.
    (from, (f64::from(target_len) * scale).min(source_len - from))
}

/// Hands a decoder that has read the header, the bytes it reads, and the size found there, to `read`.
fn open<T>(jpeg: &[u8], read: impl FnOnce(Decoder<'_>, &[u8], (u32, u32)) -> Result<T>) -> Result<T> {
    let tidy;
    let (decoder, jpeg) = match read_header(jpeg) {
        // Not by a decoder that is less strict: it would fill up with grey what breaks off.
        // What does not begin as a picture may still hold one, small, of what it is.
        Err(_) if jpeg.starts_with(&[0xff, 0xd8]) => {
            tidy = tidied(jpeg);
            (read_header(&tidy), &tidy[..])
        }
        decoder => (decoder, jpeg),
    };
    let decoder = decoder.map_err(|error| Error::Picture(error.to_string()))?;
    let info = decoder.info().ok_or_else(|| Error::Picture("no header".into()))?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    if width == 0 || height == 0 {
        return Err(Error::Picture("no pixels".into()));
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(Error::PictureSize { width, height, limit: MAX_PIXELS });
    }
    read(decoder, jpeg, (width, height))
}

fn read_header(jpeg: &[u8]) -> std::result::Result<Decoder<'_>, DecodeErrors> {
    let side = usize::from(u16::MAX);
    let options =
        DecoderOptions::default().set_strict_mode(true).set_max_width(side).set_max_height(side).jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(jpeg), options);
    decoder.decode_headers()?;
    Ok(decoder)
}

/// Runs the decoder so that bytes which make it panic are an error like any other.
fn guarded<T>(decode: impl FnOnce() -> Result<T> + std::panic::UnwindSafe) -> Result<T> {
    catch_unwind(decode).unwrap_or_else(|_| Err(Error::Picture("the decoder panicked".into())))
}

#[cfg(test)]
mod tests {
    use peapod_proto::ids::{Epoch, SampleName, ShardId};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{jpeg_of, noisy_jpeg};

    fn rng(index: u32) -> SampleRng {
        SampleRng::new(1, SampleName { epoch: Epoch(0), shard: ShardId(0), index })
    }

    /// A PPM file as Pillow writes it.
    fn ppm(bytes: &[u8]) -> Rgb {
        let header_len = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(2).unwrap().0 + 1;
        let header = std::str::from_utf8(&bytes[..header_len]).unwrap();
        let numbers: Vec<u32> = header.split_ascii_whitespace().skip(1).map(|word| word.parse().unwrap()).collect();
        Rgb { width: numbers[0], height: numbers[1], bytes: bytes[header_len..].to_vec() }
    }

    fn largest_difference(a: &[u8], b: &[u8]) -> u8 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
    }

    /// Files by testdata/make_pillow_cases.py. The picture is smaller or larger than the bucket, and exceeds it on either axis.
    #[test]
    fn resizing_is_within_one_grey_level_of_pillow() {
        let source = ppm(include_bytes!("../testdata/source.ppm"));
        let cases: [(&str, &[u8]); 4] = [
            ("wider, shrunk", include_bytes!("../testdata/shrunk_wide.ppm")),
            ("taller, shrunk", include_bytes!("../testdata/shrunk_tall.ppm")),
            ("taller, enlarged", include_bytes!("../testdata/enlarged.ppm")),
            ("barely enlarged", include_bytes!("../testdata/barely.ppm")),
        ];
        let buckets = [(24, 32), (40, 16), (96, 64), (56, 48)];
        for ((case, expected), (width, height)) in cases.into_iter().zip(buckets) {
            let (expected, bucket) = (ppm(expected), Bucket { width, height });
            assert_eq!((u64::from(expected.width), u64::from(expected.height)), covering_size((source.width, source.height), bucket));
            for index in 0..8 {
                let crop = cover(&mut Resizer::new(), &source, bucket, &rng(index)).unwrap();
                let wanted = cut(&expected, crop.corner, bucket);
                assert!(largest_difference(&crop.pixels, &wanted) <= 1, "{case}: {}", largest_difference(&crop.pixels, &wanted));
            }
        }
    }

    fn cut(picture: &Rgb, (y, x): (u32, u32), bucket: Bucket) -> Vec<u8> {
        let row = |row: u32| {
            let start = 3 * ((y + row) * picture.width + x) as usize;
            &picture.bytes[start..start + 3 * bucket.width as usize]
        };
        (0..bucket.height).flat_map(row).copied().collect()
    }

    /// Files by testdata/make_pillow_cases.py. Decoders may round differently; where colour is stored at half the resolution (4:2:0) they
    /// also enlarge it by different filters, which shows at edges.
    #[test]
    fn every_kind_of_jpeg_becomes_the_rgb_that_pillow_gives() {
        let gray: [&[u8]; 2] = [include_bytes!("../testdata/gray.jpg"), include_bytes!("../testdata/gray.ppm")];
        let cmyk: [&[u8]; 2] = [include_bytes!("../testdata/cmyk.jpg"), include_bytes!("../testdata/cmyk.ppm")];
        let progressive: [&[u8]; 2] = [include_bytes!("../testdata/progressive.jpg"), include_bytes!("../testdata/progressive.ppm")];
        let plain: [&[u8]; 2] = [include_bytes!("../testdata/cmyk_plain.jpg"), include_bytes!("../testdata/cmyk_plain.ppm")];
        let ycck: [&[u8]; 2] = [include_bytes!("../testdata/ycck.jpg"), include_bytes!("../testdata/ycck.ppm")];
        let scans: [&[u8]; 2] = [include_bytes!("../testdata/scans.jpg"), include_bytes!("../testdata/scans.ppm")];
        let restarted: [&[u8]; 2] = [include_bytes!("../testdata/scans_restarted.jpg"), include_bytes!("../testdata/scans_restarted.ppm")];
        let coarse: [&[u8]; 2] = [include_bytes!("../testdata/coarse_luma.jpg"), include_bytes!("../testdata/coarse_luma.ppm")];
        let adobe_rgb: [&[u8]; 2] = [include_bytes!("../testdata/adobe_rgb.jpg"), include_bytes!("../testdata/adobe_rgb.ppm")];
        for (case, [jpeg, expected], largest, mean) in [
            ("grayscale", gray, 1, 0.1),
            ("CMYK", cmyk, 1, 0.1),
            ("CMYK without Adobe's marker", plain, 1, 0.1),
            ("YCCK", ycck, 2, 0.5),
            ("progressive 4:2:0", progressive, 8, 0.6),
            ("a scan for each component, 4:2:0", scans, 8, 0.6),
            ("a scan for each component, with restarts", restarted, 8, 0.6),
            ("luma coarser than chroma", coarse, 3, 0.5),
            ("red, green and blue", adobe_rgb, 1, 0.1),
        ] {
            let (picture, expected) = (decode(jpeg).unwrap(), ppm(expected));
            assert_eq!((picture.width, picture.height), (expected.width, expected.height));
            let difference = largest_difference(&picture.bytes, &expected.bytes);
            assert!(difference <= largest, "{case}: {difference}");
            let sum: f64 = picture.bytes.iter().zip(&expected.bytes).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
            assert!(sum / picture.bytes.len() as f64 <= mean, "{case}: {} on average", sum / picture.bytes.len() as f64);
        }
    }

    #[test]
    fn the_jfif_marker_counts_for_more_than_adobes() {
        let plain = jpeg_of(16, 16, [200, 30, 90]);
        let adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0";
        assert_eq!(&plain[6..11], b"JFIF\0");
        let with_both = [&plain[..20], adobe, &plain[20..]].concat();
        let (picture, wanted) = (decode(&with_both).unwrap(), decode(&plain).unwrap());
        assert!(largest_difference(&picture.bytes, &wanted.bytes) <= 1, "{:?} for {:?}", &picture.bytes[..3], &wanted.bytes[..3]);
    }

    #[test]
    fn shrinking_changes_no_colours() {
        let bucket = Bucket { width: 10, height: 8 };
        for (case, jpeg, by) in [
            ("red, green and blue", &include_bytes!("../testdata/adobe_rgb.jpg")[..], 2),
            ("a scan for each component", include_bytes!("../testdata/scans.jpg"), 2),
            ("luma coarser than chroma", include_bytes!("../testdata/coarse_luma.jpg"), 2),
        ] {
            let whole = decode(jpeg).unwrap();
            let size = (whole.width, whole.height);
            let shrunk = decode_shrunk(jpeg, size, bucket).unwrap();
            assert_eq!(shrunk.1, by, "{case}");
            let wanted = cover(&mut Resizer::new(), &whole, bucket, &rng(0)).unwrap();
            let crop = cover_shrunk(&mut Resizer::new(), &shrunk.0, size, by, bucket, &rng(0)).unwrap();
            let sum: u64 = crop.pixels.iter().zip(&wanted.pixels).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            let mean = sum as f64 / crop.pixels.len() as f64;
            assert!(mean < 4.0, "{case}: {mean} on average");
        }
    }

    /// Where the segments of a JPEG's header begin, but for the first marker, which stands alone.
    fn segments(jpeg: &[u8]) -> Vec<usize> {
        let mut starts = vec![2];
        while let Some(&at) = starts.last()
            && jpeg[at + 1] != 0xda
        {
            starts.push(at + 2 + usize::from(u16::from_be_bytes([jpeg[at + 2], jpeg[at + 3]])));
        }
        starts
    }

    /// Pillow 13.0 gives the same pixels for all of these files as for those without the bytes, which libjpeg passes over with a warning
    /// ("extraneous bytes before marker"), and refuses them where they break off. Only right after the first marker it takes none.
    #[test]
    fn bytes_between_the_segments_of_a_header_are_passed_over_as_pillow_does() {
        let files: [&[u8]; 4] = [
            include_bytes!("../testdata/progressive.jpg"),
            include_bytes!("../testdata/gray.jpg"),
            include_bytes!("../testdata/turn1.jpg"),
            include_bytes!("../testdata/ycck.jpg"),
        ];
        for whole in files {
            let expected = decode(whole).unwrap();
            let starts = segments(whole);
            assert!(starts.len() > 4, "{starts:?}");
            for &at in &starts[1..] {
                for stray in [&[0; 4][..], &[7; 300], &[1, 0xff, 0, 2, 3, 0xff, 0, 9, 9, 0xff]] {
                    let jpeg = [&whole[..at], stray, &whole[at..]].concat();
                    assert_eq!(size(&jpeg).unwrap(), (expected.width, expected.height), "at {at}");
                    assert!(decode(&jpeg).unwrap() == expected, "{} bytes at {at}", stray.len());
                    assert_eq!(format::turn(&jpeg), format::turn(whole), "at {at}");
                    let cut = &jpeg[..jpeg.len() - whole.len() / 4];
                    assert!(decode(cut).is_err(), "what breaks off is refused all the same");
                }
            }
        }
    }

    fn segment(marker: u8, body: &[u8]) -> Vec<u8> {
        [&[0xff, marker][..], &(body.len() as u16 + 2).to_be_bytes(), body].concat()
    }

    /// Pillow 13.0 gives the same pixels for all of these files as for those without the segments.
    #[test]
    fn metadata_that_are_broken_are_no_reason_to_refuse_a_picture() {
        for whole in [&include_bytes!("../testdata/turn1.jpg")[..], include_bytes!("../testdata/adobe_rgb.jpg")] {
            let expected = decode(whole).unwrap();
            for broken in
                [segment(0xee, b"Adobe\0\x64\0\0\0\0"), segment(0xe1, b"http://ns.adobe.com/xmp/extension/\0short"), segment(0xcc, b"")]
            {
                let jpeg = [&whole[..2], &broken, &whole[2..]].concat();
                assert_eq!(size(&jpeg).unwrap(), (expected.width, expected.height));
                assert!(decode(&jpeg).unwrap() == expected, "{broken:?}");
                assert_eq!(format::turn(&jpeg), format::turn(whole), "{broken:?}");
                assert!(decode(&jpeg[..jpeg.len() * 3 / 4]).is_err(), "what breaks off is refused all the same");
                assert!(size(&[b"\n", &jpeg[..]].concat()).is_err(), "what begins otherwise is no picture");
            }
        }
    }

    /// Pillow 13.0 gives the same pixels for all of these files as for those without the segments.
    #[test]
    fn segments_behind_the_scan_are_no_reason_to_refuse_a_picture() {
        for whole in [jpeg_of(200, 200, [1, 100, 200]), noisy_jpeg(64, 48, 2), include_bytes!("../testdata/scans.jpg").to_vec()] {
            let expected = decode(&whole).unwrap();
            let (start, end) = whole.split_at(whole.len() - 2);
            for segments in [segment(0xe5, b"abc"), [segment(0xfe, b"\xff\xd9"), segment(0xe0, b"")].concat()] {
                let jpeg = [start, &segments, end].concat();
                assert!(decode(&jpeg).unwrap() == expected, "{segments:?}");
            }
        }
        // In the middle of a scan they are damage.
        let whole = noisy_jpeg(64, 48, 2);
        let middle = whole.len() / 2;
        assert!(decode(&[&whole[..middle], &segment(0xe5, b"abc"), &whole[middle..]].concat()).is_err());
        // How many lines there are is said once more behind the scan.
        let end = whole.len() - 2;
        let repeated = [&whole[..end], &segment(0xdc, &[0, 48]), &whole[end..]].concat();
        assert!(decode(&repeated).unwrap() == decode(&whole).unwrap());
    }

    /// Files by testdata/make_pillow_cases.py: what its `exif_transpose` gives for each orientation.
    #[test]
    fn pictures_are_turned_as_their_exif_data_say_where_the_job_wants_it() {
        let mut jpeg = include_bytes!("../testdata/turn1.jpg").to_vec();
        let at = jpeg.windows(10).position(|bytes| bytes == [1, 0x12, 0, 3, 0, 0, 0, 1, 0, 1]).unwrap() + 9;
        let upright = decode(&jpeg).unwrap();
        let cases: [&[u8]; 8] = [
            include_bytes!("../testdata/turn1.ppm"),
            include_bytes!("../testdata/turn2.ppm"),
            include_bytes!("../testdata/turn3.ppm"),
            include_bytes!("../testdata/turn4.ppm"),
            include_bytes!("../testdata/turn5.ppm"),
            include_bytes!("../testdata/turn6.ppm"),
            include_bytes!("../testdata/turn7.ppm"),
            include_bytes!("../testdata/turn8.ppm"),
        ];
        for (orientation, expected) in (1..).zip(cases) {
            jpeg[at] = orientation;
            let (turn, expected) = (format::turn(&jpeg), ppm(expected));
            let picture = decode(&jpeg).unwrap();
            assert_eq!(picture, upright, "decoding alone does not look at it");
            let turned = turn.apply(picture);
            assert_eq!(turn.size((16, 8)), (expected.width, expected.height), "{orientation}");
            assert_eq!((turned.width, turned.height), (expected.width, expected.height), "{orientation}");
            assert!(largest_difference(&turned.bytes, &expected.bytes) <= 1, "{orientation}");
        }
        jpeg[at] = 99;
        assert_eq!(format::turn(&jpeg), format::Turn::NONE, "an orientation that is none");
        assert_eq!(format::turn(&jpeg_of(8, 8, [0; 3])), format::Turn::NONE, "no EXIF data");
    }

    #[test]
    fn jpegs_of_more_than_8_bits_are_refused() {
        let mut jpeg = jpeg_of(8, 8, [0; 3]);
        let frame = jpeg.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
        for bits in [12, 16] {
            jpeg[frame + 4] = bits;
            let error = size(&jpeg).unwrap_err().to_string();
            assert!(error.contains(&format!("{bits} bits")), "{error}");
        }
    }

    #[test]
    fn the_size_is_read_from_the_header_alone() {
        let jpeg = jpeg_of(40, 24, [200, 10, 10]);
        assert_eq!(size(&jpeg).unwrap(), (40, 24));
        assert_eq!(decode(&jpeg).unwrap().bytes.len(), 40 * 24 * 3);
    }

    #[test]
    fn a_header_that_claims_too_many_pixels_is_refused() {
        let mut jpeg = jpeg_of(8, 8, [0; 3]);
        let frame = jpeg.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff; 4]);
        assert!(matches!(size(&jpeg).unwrap_err(), Error::PictureSize { width: 65_535, height: 65_535, .. }));
        assert!(matches!(decode(&jpeg).unwrap_err(), Error::PictureSize { .. }));
    }

    #[test]
    fn a_picture_whose_bytes_end_too_soon_is_refused() {
        let jpeg = noisy_jpeg(64, 64, 1);
        for part in [0, 10, jpeg.len() / 2, jpeg.len() * 9 / 10] {
            assert!(decode(&jpeg[..part]).is_err(), "cut at {part} of {}", jpeg.len());
        }
    }

    #[test]
    fn plain_pictures_decode_to_their_end() {
        // So few bits to a row that the decoder's look-ahead meets the end of the file long before the last row.
        let picture = decode(&jpeg_of(512, 512, [250, 250, 250])).unwrap();
        assert!(picture.bytes.iter().all(|byte| byte.abs_diff(250) <= 2));
    }

    /// A picture without edges, as a photograph is mostly, with detail of its own in every block.
    fn waves(width: u32, height: u32) -> Vec<u8> {
        let wave =
            |x: u32, y: u32, length: f64| (127.0 + 60.0 * ((f64::from(x) / length).sin() + (f64::from(y) / length / 1.3).cos())) as u8;
        crate::testing::jpeg_from(width, height, |x, y| [wave(x, y, 23.0), wave(y, x, 31.0), wave(x + y, y, 17.0)])
    }

    #[test]
    fn a_picture_much_larger_than_its_bucket_is_shrunk_while_decoding_and_looks_the_same() {
        let bucket = Bucket { width: 64, height: 48 };
        // The last two are not a multiple of what they are divided by.
        for (size, by) in [((512, 384), 4), ((1030, 770), 8), ((301, 231), 2), ((523, 389), 4)] {
            let jpeg = waves(size.0, size.1);
            let (shrunk, divisor) = decode_shrunk(&jpeg, size, bucket).unwrap();
            assert_eq!((divisor, shrunk.width, shrunk.height), (by, size.0.div_ceil(by), size.1.div_ceil(by)));
            let whole = decode(&jpeg).unwrap();
            for index in 0..4 {
                let wanted = cover(&mut Resizer::new(), &whole, bucket, &rng(index)).unwrap();
                let crop = cover_shrunk(&mut Resizer::new(), &shrunk, size, by, bucket, &rng(index)).unwrap();
                assert_eq!(crop.corner, wanted.corner, "the same crop");
                let sum: u64 = crop.pixels.iter().zip(&wanted.pixels).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
                let mean = sum as f64 / crop.pixels.len() as f64;
                assert!(mean < 0.75, "{size:?}: {mean} on average");
            }
        }
    }

    #[test]
    fn a_picture_is_never_shrunk_below_twice_its_bucket() {
        let bucket = Bucket { width: 64, height: 48 };
        for size in [(255, 192), (256, 191), (128, 4096), (64, 48), (20, 20)] {
            let (picture, by) = decode_shrunk(&waves(size.0, size.1), size, bucket).unwrap();
            assert_eq!((by, picture.width, picture.height), (1, size.0, size.1));
        }
        assert_eq!(decode_shrunk(&waves(256, 192), (256, 192), bucket).unwrap().1, 2);
    }

    #[test]
    fn kinds_of_jpeg_that_gain_nothing_are_decoded_whole() {
        let bucket = Bucket { width: 8, height: 8 };
        for jpeg in [
            &include_bytes!("../testdata/gray.jpg")[..],
            include_bytes!("../testdata/cmyk.jpg"),
            include_bytes!("../testdata/progressive.jpg"),
        ] {
            let (picture, by) = decode_shrunk(jpeg, size(jpeg).unwrap(), bucket).unwrap();
            assert_eq!((picture, by), (decode(jpeg).unwrap(), 1));
        }
    }

    #[test]
    fn a_large_picture_whose_bytes_end_too_soon_is_refused_too() {
        let jpeg = noisy_jpeg(256, 256, 1);
        let bucket = Bucket { width: 16, height: 16 };
        assert_eq!(decode_shrunk(&jpeg, (256, 256), bucket).unwrap().1, 8);
        for percent in [30, 50, 75, 90, 99] {
            assert!(decode_shrunk(&jpeg[..jpeg.len() * percent / 100], (256, 256), bucket).is_err(), "cut at {percent} %");
        }
    }

    #[test]
    fn a_thin_picture_costs_no_more_than_its_crop() {
        let bucket = Bucket { width: 448, height: 896 };
        let picture = decode(&jpeg_of(1, 9000, [9, 99, 199])).unwrap();
        let crop = cover(&mut Resizer::new(), &picture, bucket, &rng(0)).unwrap();
        assert_eq!(crop.pixels.len(), 448 * 896 * 3);
        assert!(crop.corner.0 <= 448 * 9000 - 896);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_decoded(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_damaged_jpeg_is_refused_or_decoded(changes in proptest::collection::vec((0_usize..4096, any::<u8>()), 1..8)) {
            let mut jpeg = noisy_jpeg(32, 24, 3);
            let len = jpeg.len();
            for (position, byte) in changes {
                jpeg[position % len] = byte;
            }
            let _ = decode_shrunk(&jpeg, (32, 24), Bucket { width: 8, height: 8 });
            if let Ok(picture) = decode(&jpeg) {
                let crop = cover(&mut Resizer::new(), &picture, Bucket { width: 16, height: 16 }, &rng(0)).unwrap();
                prop_assert_eq!(crop.pixels.len(), 16 * 16 * 3);
            }
        }
    }
}
