//! The format once more, as slowly and plainly as it can be read: byte by byte, in numbers too wide to
//! overflow, with sets where the decoder has an ordering. It shares no code with it, and lets zstd judge its
//! own frames.

use std::collections::BTreeSet;

use dwcp_proto::Codec;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

const PAGE: u128 = 4096;
const MAX_STREAM: u128 = 1024 * 1024 + 128 * 1024;
const MAX_RAW: u128 = MAX_STREAM + 64 * 1024;
const MAX_RECORDS: u128 = 4096;
const MAX_FULL_PAGES: u128 = 256;
const MAX_NAMES: u128 = 1024;
const WINDOW_LOG: u32 = 21;

/// What a receiver holds: block, page index, content; oldest first.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Slots of a cache; `None` where everything is held.
    pub slots: Option<u32>,
    pages: Vec<(Vec<u8>, u128, Vec<u8>)>,
}

impl Model {
    /// Nothing is held yet.
    pub fn new(slots: Option<u32>) -> Self {
        Model { slots, pages: Vec::new() }
    }

    fn slot(&self, block: &[u8], page: u128) -> u128 {
        let mut home: u64 = 14_695_981_039_346_656_037;
        for byte in block {
            home = (home ^ u64::from(*byte)).wrapping_mul(1_099_511_628_211);
        }
        (u128::from(home) + page) % (1 << 64) % u128::from(self.slots.unwrap_or(1))
    }

    /// A page was delivered.
    pub fn put(&mut self, block: &[u8], page: u128, content: Vec<u8>) {
        let slot = self.slot(block, page);
        let mut pages = std::mem::take(&mut self.pages);
        pages.retain(|(name, index, _)| {
            let same = name == block && *index == page;
            !same && (self.slots.is_none() || self.slot(name, *index) != slot)
        });
        pages.push((block.to_vec(), page, content));
        self.pages = pages;
    }

    fn zero(&mut self, block: &[u8], page: u128) {
        match self.slots {
            None => self.put(block, page, vec![0; PAGE as usize]),
            Some(_) => self.pages.retain(|(name, index, _)| name != block || *index != page),
        }
    }

    fn get(&self, block: &[u8], page: u128) -> Option<Vec<u8>> {
        let held = self.pages.iter().find(|(name, index, _)| name == block && *index == page)?;
        Some(held.2.clone())
    }
}

/// The bytes of stream that a payload stands for, or `None` where a decoder has to refuse it, because it has
/// references among other reasons.
pub fn decode(codec: Codec, payload: &[u8], raw_len: usize, stream_len: usize) -> Option<Vec<u8>> {
    let raw = unpack(codec, payload, raw_len, stream_len)?;
    if raw.first() != Some(&1) {
        return None;
    }
    let stream = records(&raw, &mut Model::new(None))?;
    (stream.len() == stream_len).then_some(stream)
}

/// The same where references are allowed, and where `model` is what the receiver holds. Refused chunks may leave
/// traces in it.
pub fn replay(
    codec: Codec,
    payload: &[u8],
    raw_len: usize,
    stream_len: usize,
    model: &mut Model,
) -> Option<Vec<u8>> {
    let raw = unpack(codec, payload, raw_len, stream_len)?;
    let stream = records(&raw, model)?;
    (stream.len() == stream_len).then_some(stream)
}

fn unpack(codec: Codec, payload: &[u8], raw_len: usize, stream_len: usize) -> Option<Vec<u8>> {
    if payload.len() as u128 > MAX_RAW || raw_len as u128 > MAX_RAW || stream_len as u128 > MAX_STREAM {
        return None;
    }
    let raw = match codec {
        Codec::Raw => payload.to_vec(),
        Codec::Lz4 => lz4_flex::block::decompress(payload, raw_len).ok()?,
        Codec::Zstd => zstd(payload, raw_len)?,
        // See `Lane`.
        Codec::Lane => return None,
    };
    (raw.len() == raw_len).then_some(raw)
}

/// A lane's chunks so far: each is opened by decompressing its whole frame again, a byte at a time.
#[derive(Debug, Clone, Default)]
pub struct Lane {
    /// The payloads of the frame under way, without their positions.
    frame: Vec<Vec<u8>>,
    /// What they decompressed to.
    raw: Vec<u8>,
}

impl Lane {
    /// As [`replay`] for the lane's next chunk; after a refusal a chunk can only begin a frame.
    pub fn replay(
        &mut self,
        payload: &[u8],
        raw_len: usize,
        stream_len: usize,
        window_log: u32,
        model: &mut Model,
    ) -> Option<Vec<u8>> {
        let Lane { mut frame, raw: mut before } = std::mem::take(self);
        if payload.len() as u128 > MAX_RAW || raw_len as u128 > MAX_RAW || stream_len as u128 > MAX_STREAM {
            return None;
        }
        let [a, b, c, d, blocks @ ..] = payload else { return None };
        let position = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        if position == 0 {
            (frame, before) = (Vec::new(), Vec::new());
            // Magic, a descriptor without content size, checksum and dictionary, and a window.
            if !blocks.starts_with(&[0x28, 0xb5, 0x2f, 0xfd, 0]) || blocks.len() < 6 {
                return None;
            }
        } else if position != frame.len() {
            return None;
        }
        frame.push(blocks.to_vec());
        let mut context = DCtx::create();
        context.set_parameter(DParameter::WindowLogMax(window_log)).ok()?;
        let mut all = Vec::new();
        for byte in frame.iter().flatten() {
            let mut input = InBuffer::around(std::slice::from_ref(byte));
            loop {
                let mut step = [0; 1000];
                let mut output = OutBuffer::around(&mut step[..]);
                let hint = context.decompress_stream(&mut output, &mut input).ok()?;
                let written = output.as_slice().len();
                all.extend_from_slice(&step[..written]);
                if hint == 0 {
                    return None;
                }
                if written == 0 && input.pos() == 1 {
                    break;
                }
            }
        }
        let raw = all.strip_prefix(&before[..])?.to_vec();
        if raw.len() != raw_len {
            return None;
        }
        let stream = records(&raw, model)?;
        *self = Lane { frame, raw: all };
        (stream.len() == stream_len).then_some(stream)
    }
}

/// Decompresses in small steps: only then does the library hold a frame to the window's limit.
fn zstd(payload: &[u8], raw_len: usize) -> Option<Vec<u8>> {
    if !payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || *payload.get(4)? & 0x03 != 0 {
        return None;
    }
    if zstd_safe::get_frame_content_size(payload).ok()?? != raw_len as u64 {
        return None;
    }
    let mut context = DCtx::create();
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)).ok()?;
    let mut input = InBuffer::around(payload);
    let mut raw = Vec::new();
    loop {
        let mut step = [0; 1000];
        let mut output = OutBuffer::around(&mut step[..]);
        let before = input.pos();
        let hint = context.decompress_stream(&mut output, &mut input).ok()?;
        let written = output.as_slice().len();
        raw.extend_from_slice(&step[..written]);
        if hint == 0 {
            return (input.pos() == payload.len()).then_some(raw);
        }
        if written == 0 && input.pos() == before {
            return None;
        }
    }
}

/// The same for a payload before compression, whatever stream length was announced.
pub fn records(raw: &[u8], model: &mut Model) -> Option<Vec<u8>> {
    let mut bytes = raw.iter().copied();
    let version = bytes.next()?;
    if !(version == 1 || version == 2) || bytes.next()? != 0 {
        return None;
    }
    let name_count = fixed(&mut bytes, 2)?;
    let [table_len, opaque_len, page_count] = numbers(&mut bytes)?;
    let (head, [proof_count, mask_count, line_count]) = match version {
        1 => (16, [0; 3]),
        _ => (28, numbers(&mut bytes)?),
    };
    if version == 2 && proof_count == 0 {
        return None;
    }
    let content = proof_count * 8 + mask_count * 4 + page_count * PAGE + line_count * 128;
    if name_count > MAX_NAMES || head + table_len + opaque_len + content != raw.len() as u128 {
        return None;
    }
    let mut table = take(&mut bytes, table_len)?.into_iter();
    let mut opaque = take(&mut bytes, opaque_len)?.into_iter();
    let mut proofs = take(&mut bytes, proof_count * 8)?.into_iter();
    let mut masks = take(&mut bytes, mask_count * 4)?.into_iter();
    let mut pages = take(&mut bytes, page_count * PAGE)?.into_iter();
    let mut lines = bytes;

    let mut names = Vec::new();
    for _ in 0..name_count {
        let len = u128::from(table.next()?);
        names.push(take(&mut table, len)?);
    }
    let distinct: BTreeSet<_> = names.iter().cloned().collect();
    if distinct.into_iter().collect::<Vec<_>>() != names {
        return None;
    }

    let mut stream = Vec::new();
    let mut seen: BTreeSet<(u128, u128)> = BTreeSet::new();
    let mut records = 0;
    let mut full_pages = 0;
    let mut last_block = None;
    while let Some(code) = table.next() {
        let named = code >= 0x80;
        match code % 0x80 {
            1 if !named => {
                let len = varint(&mut table)?;
                if len == 0 {
                    return None;
                }
                stream.extend(take(&mut opaque, len)?);
                records += 1;
            }
            kind @ 2..=7 => {
                let (block, gap, count) = (varint(&mut table)?, varint(&mut table)?, varint(&mut table)?);
                let name = names.get(usize::try_from(block).ok()?)?;
                let from = match kind {
                    6 => Some((varint(&mut table)?, varint(&mut table)?)),
                    _ => None,
                };
                if count == 0 || records + count > MAX_RECORDS {
                    return None;
                }
                let latest = seen.iter().filter(|(of, _)| *of == block).map(|(_, page)| page + 1).max();
                let first = latest.unwrap_or(0) + gap;
                for page in first..first + count {
                    if page * PAGE > u128::from(u64::MAX) || !seen.insert((block, page)) {
                        return None;
                    }
                    let with_name = named && page == first;
                    if !with_name && last_block.is_some_and(|last| last != block) {
                        return None;
                    }
                    last_block = Some(block);
                    let flag: u128 = if kind == 3 { 0x02 } else { 0x08 };
                    let word = page * PAGE + flag + if with_name { 0 } else { 0x20 };
                    stream.extend_from_slice(&word.to_be_bytes()[8..]);
                    if with_name {
                        stream.push(name.len() as u8);
                        stream.extend_from_slice(name);
                    }
                    let mut content = match (kind, from) {
                        (2, _) => take(&mut pages, PAGE)?,
                        (5 | 7, _) => model.get(name, page)?,
                        (6, Some((block, start))) => {
                            let source = start + page - first;
                            if source * PAGE > u128::from(u64::MAX) {
                                return None;
                            }
                            model.get(names.get(usize::try_from(block).ok()?)?, source)?
                        }
                        _ => vec![0; PAGE as usize],
                    };
                    if kind == 7 {
                        let mask = fixed(&mut masks, 4)?;
                        if mask == 0 || mask == (1 << 32) - 1 {
                            return None;
                        }
                        for line in 0..32 {
                            if mask / (1 << line) % 2 == 1 {
                                content.splice(line * 128..line * 128 + 128, take(&mut lines, 128)?);
                            }
                        }
                    }
                    if kind >= 5 && take(&mut proofs, 8)? != blake3::hash(&content).as_bytes()[..8] {
                        return None;
                    }
                    if kind == 3 || kind == 4 {
                        model.zero(name, page);
                    } else {
                        model.put(name, page, content.clone());
                    }
                    match kind {
                        3 => stream.push(0),
                        _ => stream.extend(content),
                    }
                    records += 1;
                    full_pages += u128::from(kind != 3);
                    if full_pages > MAX_FULL_PAGES {
                        return None;
                    }
                }
            }
            _ => return None,
        }
        if records > MAX_RECORDS || stream.len() as u128 > MAX_STREAM {
            return None;
        }
    }
    let rest = opaque.len() + proofs.len() + masks.len() + pages.len() + lines.len();
    (rest == 0).then_some(stream)
}

fn numbers(bytes: &mut impl Iterator<Item = u8>) -> Option<[u128; 3]> {
    Some([fixed(bytes, 4)?, fixed(bytes, 4)?, fixed(bytes, 4)?])
}

fn fixed(bytes: &mut impl Iterator<Item = u8>, len: u128) -> Option<u128> {
    Some(take(bytes, len)?.into_iter().fold(0, |value, byte| value * 256 + u128::from(byte)))
}

fn take(bytes: &mut impl Iterator<Item = u8>, len: u128) -> Option<Vec<u8>> {
    let taken: Vec<u8> = bytes.take(usize::try_from(len).ok()?).collect();
    (taken.len() as u128 == len).then_some(taken)
}

fn varint(bytes: &mut impl Iterator<Item = u8>) -> Option<u128> {
    let mut value = 0u128;
    let mut unit = 1u128;
    for place in 0..10 {
        let byte = u128::from(bytes.next()?);
        value += byte % 128 * unit;
        unit *= 128;
        if byte < 128 {
            let shortest = place == 0 || byte != 0;
            return (shortest && value <= u128::from(u64::MAX)).then_some(value);
        }
    }
    None
}
