//! Where a node stands in a percentage rollout.

/// The node's bucket in the group, 1 to 100: it is in at `p` percent if its bucket is at most `p`.
///
/// Unleash's normalised hash: MurmurHash3 over `group:node`, modulo 100, plus 1. It does not depend on the percentage,
/// so raising that only ever adds nodes.
pub fn bucket(group: &str, node: &str) -> u8 {
    let hash = murmur3_x86_32(format!("{group}:{node}").as_bytes());
    // At most 100.
    (hash % 100) as u8 + 1
}

/// MurmurHash3_x86_32 with seed 0 (Austin Appleby, public domain). Not for what must resist an attacker.
fn murmur3_x86_32(bytes: &[u8]) -> u32 {
    let (blocks, tail) = bytes.as_chunks::<4>();
    let mut hash: u32 = 0;
    for block in blocks {
        hash ^= scramble(u32::from_le_bytes(*block));
        hash = hash.rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    }
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    hash ^= scramble(u32::from_le_bytes(last));

    hash ^= bytes.len() as u32;
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

fn scramble(block: u32) -> u32 {
    block.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_murmur3() {
        for (text, hash) in [
            ("", 0),
            ("hello", 0x248b_fa47),
            ("hello, world", 0x149b_bb7f),
            ("The quick brown fox jumps over the lazy dog", 0x2e4f_f723),
        ] {
            assert_eq!(murmur3_x86_32(text.as_bytes()), hash, "{text:?}");
        }
    }

    #[test]
    fn buckets_are_those_of_unleash() {
        // The first two stand in Unleash's client specification.
        for (group, node, expected) in [
            ("gr1", "123", 73),
            ("groupX", "999", 25),
            ("dwcp_v3_hde", "node-123", 51),
            ("dwcp_v3_hde", "node-456", 41),
            ("dwcp_v3_hde", "node-001", 90),
            ("dwcp_v3_hde", "hv-01.dc1", 91),
        ] {
            assert_eq!(bucket(group, node), expected, "{group}:{node}");
        }
    }

    #[test]
    fn every_bucket_holds_about_as_many_nodes() {
        let mut count = [0; 101];
        for node in 0..100_000 {
            count[usize::from(bucket("dwcp_v3_hde", &format!("node-{node}")))] += 1;
        }
        assert_eq!(count[0], 0);
        assert!(count[1..].iter().all(|n| (800..1200).contains(n)), "{count:?}");
    }
}
