//! Compares codecs, levels and chunk sizes on real page data: `codecs FILE...`, each file one line of data (a
//! dump of a process's memory, a program, a library). Zero pages are left out, as they never reach a codec.

use std::hint::black_box;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dwcp_benches::{Page, segments};
use dwcp_hde::{Choice, Decoder, Encoded, Encoder, Fallback};
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{Segment, StreamOffset};
use rustix::time::{ClockId, clock_gettime};

/// Bytes looked at; more of one file tells little more.
const MAX_BYTES: usize = 64 << 20;
/// Each figure is the best of this many passes over the data.
const PASSES: usize = 3;

fn main() -> Result<()> {
    let files: Vec<_> = std::env::args().skip(1).collect();
    ensure!(!files.is_empty(), "usage: codecs FILE...");
    let mut pages = Vec::new();
    for file in &files {
        let data = std::fs::read(file).with_context(|| format!("read {file}"))?;
        pages.extend(data.as_chunks::<PAGE_SIZE>().0.iter().filter(|page| **page != [0; PAGE_SIZE]).copied());
        pages.truncate(MAX_BYTES / PAGE_SIZE);
    }
    ensure!(!pages.is_empty(), "no page with content");
    println!(
        "{} MiB of pages with content; GB/s of guest memory by one thread's CPU time",
        (pages.len() * PAGE_SIZE) >> 20
    );
    println!(
        "{:<12} {:>8} {:>8} {:>8} {:>7} {:>8} {:>8}",
        "codec", "chunk", "encode", "decode", "ratio", "saved", "raw"
    );
    for per_segment in [64, 128, 256] {
        let segments = segments(&pages, per_segment);
        for (name, choice) in choices() {
            report(&name, per_segment, &pages, &segments, choice)?;
        }
    }
    judge_the_sample(&segments(&pages, 64))
}

fn choices() -> Vec<(String, Choice)> {
    let levels = [-5, -3, -1, 1, 2, 3];
    let zstd = levels.iter().map(|&level| (format!("zstd {level}"), Choice::Zstd(level)));
    let sampled = [(-1), 1].iter().map(|&level| (format!("sampled {level}"), Choice::Sampled(level)));
    [("raw".to_owned(), Choice::Raw), ("lz4".to_owned(), Choice::Lz4)]
        .into_iter()
        .chain(zstd)
        .chain(sampled)
        .collect()
}

fn report(
    name: &str,
    per_segment: usize,
    pages: &[Page],
    segments: &[Segment],
    choice: Choice,
) -> Result<()> {
    let (mut encode, mut decode) = (Duration::MAX, Duration::MAX);
    let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
    let (mut payload, mut out) = (Vec::new(), Vec::new());
    let (mut sent, mut raw) = (0, 0);
    for _ in 0..PASSES {
        let (mut encoding, mut decoding) = (Duration::ZERO, Duration::ZERO);
        (sent, raw) = (0, 0);
        for segment in segments {
            let start = cpu_time();
            let encoded = encoder.encode(segment, choice, &mut payload)?;
            encoding += cpu_time() - start;
            sent += payload.len();
            raw += usize::from(encoded.fallback.is_some());
            out.clear();
            let start = cpu_time();
            decode_one(&mut decoder, &encoded, &payload, segment, &mut out)?;
            decoding += cpu_time() - start;
            ensure!(out == segment.bytes, "the segment at {} did not come back", segment.offset);
        }
        encode = encode.min(encoding);
        decode = decode.min(decoding);
    }
    let bytes = (pages.len() * PAGE_SIZE) as f64;
    println!(
        "{name:<12} {:>4} KiB {:>8.2} {:>8.2} {:>7.2} {:>6.1} % {:>6.1} %",
        (per_segment * PAGE_SIZE) >> 10,
        bytes / encode.as_secs_f64() / 1e9,
        bytes / decode.as_secs_f64() / 1e9,
        bytes / sent as f64,
        100.0 * (1.0 - sent as f64 / bytes),
        100.0 * raw as f64 / segments.len() as f64,
    );
    Ok(())
}

fn decode_one(
    decoder: &mut Decoder,
    encoded: &Encoded,
    payload: &[u8],
    segment: &Segment,
    out: &mut Vec<u8>,
) -> Result<()> {
    let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
    Ok(decoder.decode_unverified(encoded.codec, payload, raw_len, stream_len, black_box(out))?)
}

/// CPU time of this thread: other load on the machine does not count.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// How often the sample is wrong: chunks it gives up that zstd would have shortened, and the other way round.
fn judge_the_sample(segments: &[Segment]) -> Result<()> {
    let mut encoder = Encoder::new();
    let mut payload = Vec::new();
    let (mut given_up, mut wrongly, mut lost, mut in_vain) = (0, 0, 0, 0);
    let mut worst = (0, StreamOffset(0));
    for segment in segments {
        let sampled = encoder.encode(segment, Choice::Sampled(1), &mut payload)?;
        let full = encoder.encode(segment, Choice::Zstd(1), &mut payload)?;
        let gain = full.raw_len as usize - payload.len();
        match sampled.fallback {
            Some(Fallback::Incompressible) => {
                given_up += 1;
                wrongly += usize::from(full.fallback.is_none());
                lost += gain;
                worst = worst.max((gain, segment.offset));
            }
            Some(Fallback::NoGain) => in_vain += 1,
            None => {}
        }
    }
    println!(
        "sample over {} chunks of 256 KiB: {given_up} given up, {wrongly} of them wrongly at a cost of {lost} \
         bytes (at most {} in one), {in_vain} tried in vain",
        segments.len(),
        worst.0,
    );
    Ok(())
}
