//! What a VM is made of, as its VMM tells it, in a form that travels to the peer.

use dwcp_proto::limits::{MAX_BLOCK_NAME, MAX_BLOCKS};
use serde::{Deserialize, Serialize};

use crate::qmp::{RunState, Version};

/// Bytes of a description in JSON.
pub const MAX_DESCRIPTION: usize = 64 << 10;
/// Bytes of any text in a description, block names apart.
const MAX_TEXT: usize = 256;

/// All that decides whether another VMM can take this one's guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDescription {
    /// QEMU's version.
    pub qemu: Version,
    /// The machine type's versioned name.
    pub machine: String,
    /// The CPU model's type name.
    pub cpu: String,
    /// How many CPUs.
    pub cpus: u32,
    /// The RAM blocks.
    pub ram: Vec<RamBlock>,
    /// QEMU's `-name`, if given.
    pub name: Option<String>,
    /// QEMU's `-uuid`, if given.
    pub uuid: Option<String>,
    /// The run state at the time.
    pub run_state: RunState,
}

/// One RAM block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// Its name.
    pub name: String,
    /// Bytes in use.
    pub used: u64,
    /// Bytes that it may grow to.
    pub total: u64,
    /// Bytes of a page of the memory behind it.
    pub page_size: u64,
}

/// A description from a peer that is not one.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// Too many bytes.
    #[error("the VM's description has {0} bytes, more than {MAX_DESCRIPTION}")]
    TooLong(usize),
    /// Not JSON of this form.
    #[error("the VM's description cannot be read")]
    Form(#[from] serde_json::Error),
    /// A text or list beyond its limit, or with characters that do not belong there.
    #[error("the VM's description has a bad {0}")]
    Field(&'static str),
}

impl VmDescription {
    /// As JSON for the peer.
    pub fn to_json(&self) -> Result<Vec<u8>, DescriptionError> {
        self.validate()?;
        let json = serde_json::to_vec(self)?;
        if json.len() > MAX_DESCRIPTION { Err(DescriptionError::TooLong(json.len())) } else { Ok(json) }
    }

    /// From a peer's JSON. Everything in it is within its limits and safe to show.
    pub fn from_json(json: &[u8]) -> Result<Self, DescriptionError> {
        if json.len() > MAX_DESCRIPTION {
            return Err(DescriptionError::TooLong(json.len()));
        }
        let description: Self = serde_json::from_slice(json)?;
        description.validate()?;
        Ok(description)
    }

    /// Bytes of guest RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.iter().fold(0, |sum, block| sum.saturating_add(block.used))
    }

    fn validate(&self) -> Result<(), DescriptionError> {
        let short = |text: &str, max: usize| text.len() <= max && !text.chars().any(char::is_control);
        let fields = [
            ("qemu version", self.qemu.package.as_str()),
            ("machine", &self.machine),
            ("cpu", &self.cpu),
            ("name", self.name.as_deref().unwrap_or_default()),
            ("uuid", self.uuid.as_deref().unwrap_or_default()),
            ("run state", self.run_state.as_str()),
        ];
        if let Some((field, _)) = fields.iter().find(|(_, text)| !short(text, MAX_TEXT)) {
            return Err(DescriptionError::Field(field));
        }
        if self.ram.len() > MAX_BLOCKS {
            return Err(DescriptionError::Field("list of RAM blocks"));
        }
        let sound = |b: &RamBlock| !b.name.is_empty() && short(&b.name, MAX_BLOCK_NAME) && b.used <= b.total;
        if self.ram.iter().all(sound) { Ok(()) } else { Err(DescriptionError::Field("RAM block")) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> VmDescription {
        let block = |name: &str, used, total| RamBlock { name: name.into(), used, total, page_size: 4096 };
        VmDescription {
            qemu: Version { major: 7, minor: 2, micro: 22, package: "Debian".into() },
            machine: "pc-i440fx-7.2".into(),
            cpu: "qemu64-x86_64-cpu".into(),
            cpus: 2,
            ram: vec![block("pc.ram", 1 << 30, 1 << 30), block("/rom@etc/acpi/tables", 1 << 17, 1 << 21)],
            name: Some("vm1".into()),
            uuid: None,
            run_state: RunState::Running,
        }
    }

    #[test]
    fn a_description_survives_the_journey() {
        let vm = sample();
        assert_eq!(VmDescription::from_json(&vm.to_json().unwrap()).unwrap(), vm);
        let odd = VmDescription { run_state: RunState::Other("colo".into()), ..vm };
        assert_eq!(VmDescription::from_json(&odd.to_json().unwrap()).unwrap(), odd);
    }

    #[test]
    fn a_newer_peers_field_is_tolerated() {
        let mut json: serde_json::Value = serde_json::to_value(sample()).unwrap();
        json["sockets"] = 2.into();
        assert_eq!(VmDescription::from_json(json.to_string().as_bytes()).unwrap(), sample());
    }

    #[test]
    fn a_peers_bad_description_is_refused() {
        let vm = sample();
        let field = |vm: VmDescription| {
            matches!(
                VmDescription::from_json(&serde_json::to_vec(&vm).unwrap()),
                Err(DescriptionError::Field(_))
            )
        };
        assert!(field(VmDescription { machine: "x".repeat(257), ..vm.clone() }));
        assert!(field(VmDescription { name: Some("a\nb".into()), ..vm.clone() }));
        assert!(field(VmDescription { run_state: RunState::Other("\x1b[31m".into()), ..vm.clone() }));
        let block = RamBlock { used: 2, total: 1, ..vm.ram[0].clone() };
        assert!(field(VmDescription { ram: vec![block], ..vm.clone() }));
        let tiny = RamBlock { name: "r".into(), used: 0, total: 0, page_size: 0 };
        assert!(field(VmDescription { ram: vec![tiny; MAX_BLOCKS + 1], ..vm.clone() }));
        assert!(matches!(VmDescription::from_json(b"{}"), Err(DescriptionError::Form(_))));
        let long = vec![b' '; MAX_DESCRIPTION + 1];
        assert!(matches!(VmDescription::from_json(&long), Err(DescriptionError::TooLong(_))));
    }
}
