//! Two guests' RAM, compared byte for byte with QEMU's own `pmemsave`.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::qemu::Qemu;

const PAGE: usize = 4096;

/// The first byte in which two memories differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Guest-physical address.
    pub address: u64,
    /// The byte in the first memory.
    pub left: u8,
    /// The byte in the second.
    pub right: u8,
    /// How many pages differ altogether.
    pub pages: u64,
}

/// Saves both guests' physical memory, `size` bytes from address 0, and compares. Both guests must be paused.
///
/// # Errors
/// A guest runs, or QEMU cannot save.
pub fn compare(left: &Qemu, right: &Qemu, size: u64) -> Result<Option<Difference>> {
    let save = |qemu: &Qemu| -> Result<File> {
        let status = qemu.status()?;
        ensure!(status != "running", "the RAM of a running guest cannot be compared");
        let path = qemu.dir().join("ram");
        qemu.watch().run("pmemsave", json!({ "val": 0, "size": size, "filename": path.to_str() }))?;
        let file = open_whole(&path, size);
        std::fs::remove_file(&path)?;
        file
    };
    Ok(first_difference(save(left)?, save(right)?)?)
}

/// Flips one bit in a page under test of a guest whose RAM is this file: the mistake that all the checks exist for.
///
/// # Errors
/// No such page in the file.
pub fn flip_a_test_page(backing: &Path) -> Result<()> {
    // How the guest marks its pages: tag and index, version, checksum, kind, content.
    const TAG: u64 = 0x6477_6370_0000_0000;
    let file = File::options().read(true).write(true).open(backing)?;
    let mut page = [0; PAGE];
    for at in (0..file.metadata()?.len()).step_by(PAGE) {
        file.read_exact_at(&mut page, at)?;
        let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|byte| page[index * 8 + byte]));
        if word(0) ^ TAG < 1 << 32 && word(2) != 0 {
            file.write_all_at(&[page[2048] ^ 1], at + 2048)?;
            return Ok(());
        }
    }
    anyhow::bail!("{} holds no page under test", backing.display())
}

fn open_whole(path: &Path, size: u64) -> Result<File> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let found = file.metadata()?.len();
    ensure!(found == size, "QEMU saved {found} bytes of {size}");
    Ok(file)
}

fn first_difference(left: impl Read, right: impl Read) -> std::io::Result<Option<Difference>> {
    let (mut left, mut right) = (BufReader::new(left), BufReader::new(right));
    let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
    let mut found: Option<Difference> = None;
    for page in 0_u64.. {
        match left.read_exact(&mut a) {
            Err(end) if end.kind() == std::io::ErrorKind::UnexpectedEof => break,
            other => other?,
        }
        right.read_exact(&mut b)?;
        let Some(at) = a.iter().zip(&b).position(|(x, y)| x != y) else { continue };
        found
            .get_or_insert(Difference {
                address: page * PAGE as u64 + at as u64,
                left: a[at],
                right: b[at],
                pages: 0,
            })
            .pages += 1;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_finds_the_first_byte_and_counts_the_pages() {
        let left = vec![7; 3 * PAGE];
        let mut right = left.clone();
        assert_eq!(first_difference(&left[..], &right[..]).unwrap(), None);
        (right[PAGE + 5], right[PAGE + 9], right[2 * PAGE]) = (1, 2, 3);
        let expected = Difference { address: PAGE as u64 + 5, left: 7, right: 1, pages: 2 };
        assert_eq!(first_difference(&left[..], &right[..]).unwrap(), Some(expected));
        assert!(first_difference(&left[..], &right[..PAGE]).is_err(), "a shorter memory is no equal one");
    }
}
