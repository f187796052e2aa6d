//! The picture files that a drawing may start from or be steered by.

use std::path::{Path, PathBuf};

use image::imageops::{self, FilterType};
use image::{DynamicImage, GrayImage, RgbImage};
use peapod_model::sample::SampleOptions;
use tch::{Device, Kind, Tensor};

use super::canny::canny;

/// Files of pictures, as they were asked for.
#[derive(Clone, Debug, Default)]
pub struct InputFiles {
    /// The picture to start from.
    pub image: Option<PathBuf>,
    /// What of it is drawn anew: white.
    pub mask: Option<PathBuf>,
    /// What the ControlNet is shown.
    pub control: Option<PathBuf>,
    /// Makes outlines of the control picture: the two thresholds.
    pub canny: Option<(u16, u16)>,
}

/// Pictures that were read.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// The picture to start from.
    pub image: Option<RgbImage>,
    /// Share of the steps that are made from there.
    pub strength: f64,
    /// What of it is drawn anew.
    pub mask: Option<GrayImage>,
    /// What the ControlNet is shown.
    pub control: Option<RgbImage>,
    /// How strongly.
    pub control_scale: f64,
}

impl Default for Inputs {
    fn default() -> Self {
        Self { image: None, strength: 1.0, mask: None, control: None, control_scale: 1.0 }
    }
}

/// Why a picture cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// It could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        source: image::ImageError,
    },
    /// The mask is not for this picture.
    #[error(
        "the mask {} has {}x{} pixels, the picture {} {}x{}: they must be alike",
        mask.display(), mask_size.0, mask_size.1, image.display(), image_size.0, image_size.1
    )]
    MaskSize {
        /// The mask.
        mask: PathBuf,
        /// Its width and height.
        mask_size: (u32, u32),
        /// The picture.
        image: PathBuf,
        /// Its width and height.
        image_size: (u32, u32),
    },
}

impl Inputs {
    /// Reads the files. Transparency is left out; a control picture becomes outlines where that was asked for.
    ///
    /// Errors: [`InputError`].
    pub fn read(files: &InputFiles) -> Result<Self, InputError> {
        let image = files.image.as_deref().map(read).transpose()?.map(|image| image.to_rgb8());
        let mask = files.mask.as_deref().map(read).transpose()?.map(|mask| mask.to_luma8());
        if let (Some(image), Some(mask), Some(image_path), Some(mask_path)) = (&image, &mask, &files.image, &files.mask)
            && image.dimensions() != mask.dimensions()
        {
            return Err(InputError::MaskSize {
                mask: mask_path.clone(),
                mask_size: mask.dimensions(),
                image: image_path.clone(),
                image_size: image.dimensions(),
            });
        }
        let control = files.control.as_deref().map(read).transpose()?.map(|control| match files.canny {
            Some((low, high)) => DynamicImage::from(canny(&control.to_rgb8(), low, high)).to_rgb8(),
            None => control.to_rgb8(),
        });
        Ok(Self { image, mask, control, ..Self::default() })
    }

    /// Width and height of the pictures to be drawn, if a file says: those of the picture to start from, else of the control picture.
    pub fn size(&self) -> Option<(i64, i64)> {
        self.image.as_ref().or(self.control.as_ref()).map(|image| (i64::from(image.width()), i64::from(image.height())))
    }

    /// The picture to start from at the size asked for. Shapes: `f32` `[1, 3, H, W]` in [-1, 1].
    pub(super) fn image_pixels(&self, options: &SampleOptions, device: Device) -> Option<Tensor> {
        self.image.as_ref().map(|image| pixels(image, options, device) * 2.0 - 1.0)
    }

    /// The mask at the size asked for. Shapes: `f32` `[1, 1, H, W]` in [0, 1].
    pub(super) fn mask_pixels(&self, options: &SampleOptions, device: Device) -> Option<Tensor> {
        let (width, height) = size_of(options);
        self.mask.as_ref().map(|mask| {
            let mask = resized(mask, width, height, |mask| imageops::resize(mask, width, height, FilterType::Triangle));
            to_tensor(mask.as_raw(), i64::from(height), i64::from(width), 1, device)
        })
    }

    /// The control picture at the size asked for. Shapes: `f32` `[1, 3, H, W]` in [0, 1].
    pub(super) fn control_pixels(&self, options: &SampleOptions, device: Device) -> Option<Tensor> {
        self.control.as_ref().map(|control| pixels(control, options, device))
    }
}

fn read(path: &Path) -> Result<DynamicImage, InputError> {
    let failed = |source| InputError::Read { path: path.into(), source };
    let reader = image::ImageReader::open(path).map_err(|error| failed(error.into()))?;
    reader.with_guessed_format().map_err(|error| failed(error.into()))?.decode().map_err(failed)
}

fn size_of(options: &SampleOptions) -> (u32, u32) {
    (u32::try_from(options.width).unwrap_or(1), u32::try_from(options.height).unwrap_or(1))
}

/// The picture itself where it has the size, else what `resize` makes of it.
fn resized<I: Clone + image::GenericImageView>(image: &I, width: u32, height: u32, resize: impl FnOnce(&I) -> I) -> I {
    if image.dimensions() == (width, height) { image.clone() } else { resize(image) }
}

fn pixels(image: &RgbImage, options: &SampleOptions, device: Device) -> Tensor {
    let (width, height) = size_of(options);
    let image = resized(image, width, height, |image| imageops::resize(image, width, height, FilterType::Lanczos3));
    to_tensor(image.as_raw(), i64::from(height), i64::from(width), 3, device)
}

/// Bytes of `[H, W, C]` as `f32` `[1, C, H, W]` in [0, 1].
fn to_tensor(bytes: &[u8], height: i64, width: i64, channels: i64, device: Device) -> Tensor {
    let tensor = Tensor::from_data_size(bytes, &[1, height, width, channels], Kind::Uint8);
    tensor.permute([0, 3, 1, 2]).to_kind(Kind::Float).contiguous().to_device(device) / 255.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_of_another_size_is_refused_with_both_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let (image, mask) = (dir.path().join("image.png"), dir.path().join("mask.png"));
        RgbImage::new(16, 8).save(&image).unwrap();
        GrayImage::new(8, 8).save(&mask).unwrap();
        let files = InputFiles { image: Some(image), mask: Some(mask.clone()), ..InputFiles::default() };
        let error = Inputs::read(&files).unwrap_err().to_string();
        assert!(error.contains("8x8 pixels") && error.contains("16x8"), "{error}");
        GrayImage::new(16, 8).save(&mask).unwrap();
        assert_eq!(Inputs::read(&files).unwrap().size(), Some((16, 8)));
        std::fs::write(&mask, "no picture").unwrap();
        assert!(Inputs::read(&files).unwrap_err().to_string().contains("mask.png"));
    }

    #[test]
    fn pictures_become_tensors_of_the_size_asked_for() {
        let image = RgbImage::from_fn(4, 2, |x, _| image::Rgb([255, 0, if x == 0 { 255 } else { 0 }]));
        let inputs = Inputs {
            image: Some(image.clone()),
            control: Some(image),
            mask: Some(GrayImage::from_pixel(4, 2, image::Luma([255]))),
            ..Inputs::default()
        };
        let options = SampleOptions { width: 4, height: 2, ..SampleOptions::default() };
        let pixels = inputs.image_pixels(&options, Device::Cpu).unwrap();
        assert_eq!(pixels.size(), [1, 3, 2, 4]);
        let values = |tensor: &Tensor| Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
        assert_eq!(values(&pixels.get(0).get(2).get(0)), [1.0, -1.0, -1.0, -1.0]);
        assert_eq!(values(&inputs.mask_pixels(&options, Device::Cpu).unwrap()), [1.0; 8]);
        let larger = SampleOptions { width: 8, height: 8, ..options };
        assert_eq!(inputs.control_pixels(&larger, Device::Cpu).unwrap().size(), [1, 3, 8, 8]);
    }
}
