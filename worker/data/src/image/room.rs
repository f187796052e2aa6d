//! Room for large pictures: a decoder holds several times what a picture shows, and there is one on every thread.

use std::sync::{Condvar, Mutex, PoisonError};

/// Pictures of fewer pixels are not waited with: those of all threads together take less than what they wait for, batches.
const LARGE: u64 = 1 << 24;

/// Pixels of large pictures that are decoded at the same time. At 3 bytes a pixel, and 6 more while a progressive one is decoded, this is
/// 1.2 GB: two of the largest pictures there may be, or five of 24 megapixels.
const MAX_LARGE: u64 = 1 << 27;

/// Room for all threads of this process.
pub static ROOM: Room = Room { taken: Mutex::new(0), freed: Condvar::new() };

/// How many pixels of large pictures are being decoded.
pub struct Room {
    taken: Mutex<u64>,
    freed: Condvar,
}

/// Room that is given back when this is dropped.
pub struct Taken<'a> {
    room: &'a Room,
    pixels: u64,
}

impl Room {
    /// Waits until there is room for a picture of this size.
    pub fn take(&self, (width, height): (u32, u32)) -> Taken<'_> {
        let pixels = u64::from(width) * u64::from(height);
        // One that is too large to be decoded is refused elsewhere, and must not wait for ever here.
        let pixels = if pixels < LARGE { 0 } else { pixels.min(MAX_LARGE) };
        if pixels > 0 {
            let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let mut taken = self.freed.wait_while(taken, |taken| *taken + pixels > MAX_LARGE).unwrap_or_else(PoisonError::into_inner);
            *taken += pixels;
        }
        Taken { room: self, pixels }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.pixels > 0 {
            *self.room.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.pixels;
            self.room.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn large_pictures_wait_for_each_other_and_small_ones_do_not() {
        let room = Room { taken: Mutex::new(0), freed: Condvar::new() };
        let (held, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8_u32 {
                let (room, held, most) = (&room, &held, &most);
                scope.spawn(move || {
                    for round in 0..50 {
                        let size = (8192, 2048 * (1 + (thread + round) % 4));
                        let pixels = u64::from(size.0) * u64::from(size.1);
                        let _taken = room.take(size);
                        most.fetch_max(held.fetch_add(pixels, Ordering::SeqCst) + pixels, Ordering::SeqCst);
                        std::thread::yield_now();
                        held.fetch_sub(pixels, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(most.into_inner() <= MAX_LARGE);
        let all = room.take((u32::MAX, u32::MAX));
        assert_eq!(*room.taken.lock().unwrap(), MAX_LARGE);
        // Neither waits for it.
        let small: Vec<Taken<'_>> = (0..100).map(|_| room.take((4095, 4096))).collect();
        drop((all, small));
        assert_eq!(*room.taken.lock().unwrap(), 0);
    }
}
