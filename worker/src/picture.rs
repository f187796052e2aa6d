//! A picture in memory, and how it is written: PNG with its origin in text chunks.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// A picture of 8-bit sRGB, row by row from the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

/// Why a picture could not be made or written.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// The number of bytes is not what the size needs.
    #[error("a picture of {width}x{height} needs {} bytes of RGB, not {got}", u64::from(*width) * u64::from(*height) * 3)]
    Size {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// How many bytes there are.
        got: usize,
    },
    /// The file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system or the encoder said.
        source: png::EncodingError,
    },
}

impl Picture {
    /// Takes `width * height * 3` bytes.
    ///
    /// Errors: [`PictureError::Size`] if there are more or fewer, or none.
    pub fn new(width: u32, height: u32, rgb: Vec<u8>) -> Result<Self, PictureError> {
        if rgb.is_empty() || rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
            return Err(PictureError::Size { width, height, got: rgb.len() });
        }
        Ok(Self { width, height, rgb })
    }

    /// Width in pixels, at least 1.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels, at least 1.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `width * height * 3` bytes.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Encodes a PNG whose `texts` (keyword, UTF-8 text) say where it comes from.
    ///
    /// Errors: the encoder's, for a keyword that is none.
    pub fn to_png(&self, texts: &[(&str, &str)]) -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        self.encode(&mut bytes, texts)?;
        Ok(bytes)
    }

    /// Writes a PNG whose `texts` (keyword, UTF-8 text) say where it comes from. Readers of `path` see the old file or the whole new one.
    ///
    /// Errors: [`PictureError::Write`].
    pub fn write_png(&self, path: &Path, texts: &[(&str, &str)]) -> Result<(), PictureError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let part = path.with_file_name(name);
        let written = self.encode_to(&part, texts).and_then(|()| Ok(fs::rename(&part, path)?));
        written.map_err(|source| {
            // Best effort: the failure that matters is the one reported.
            let _ = fs::remove_file(&part);
            PictureError::Write { path: path.to_owned(), source }
        })
    }

    fn encode_to(&self, path: &Path, texts: &[(&str, &str)]) -> Result<(), png::EncodingError> {
        let mut file = BufWriter::new(File::create(path)?);
        self.encode(&mut file, texts)?;
        file.flush()?;
        Ok(file.get_ref().sync_all()?)
    }

    fn encode(&self, target: &mut impl Write, texts: &[(&str, &str)]) -> Result<(), png::EncodingError> {
        let mut encoder = png::Encoder::new(target, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_source_srgb(png::SrgbRenderingIntent::Perceptual);
        for &(keyword, text) in texts {
            encoder.add_itxt_chunk(keyword.into(), text.into())?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn png_carries_pixels_and_chinese_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.png");
        let picture = Picture::new(2, 1, vec![1, 2, 3, 4, 5, 6]).unwrap();
        picture.write_png(&path, &[("prompt", "红色的圆形"), ("seed", "7")]).unwrap();

        let mut reader = png::Decoder::new(std::io::BufReader::new(File::open(&path).unwrap())).read_info().unwrap();
        let mut pixels = vec![0; 6];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, picture.rgb());
        let texts: Vec<_> = reader.info().utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
        assert_eq!(texts, [("prompt".into(), "红色的圆形".into()), ("seed".into(), "7".to_owned())]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file stays behind");
        assert_eq!(fs::read(&path).unwrap(), picture.to_png(&[("prompt", "红色的圆形"), ("seed", "7")]).unwrap());
    }

    #[test]
    fn picture_refuses_bytes_that_do_not_fit_its_size() {
        let error = Picture::new(2, 2, vec![0; 5]).unwrap_err();
        assert_eq!(error.to_string(), "a picture of 2x2 needs 12 bytes of RGB, not 5");
    }

    #[test]
    fn failed_write_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing/out.png");
        let error = Picture::new(1, 1, vec![0; 3]).unwrap().write_png(&path, &[]).unwrap_err();
        assert!(error.to_string().starts_with(&format!("cannot write {}", path.display())), "{error}");
    }
}
