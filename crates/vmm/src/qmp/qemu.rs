//! The commands that a migration needs.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use dwcp_proto::limits::{MAX_BLOCK_NAME, MAX_BLOCKS};
use serde_json::{Map, Value, json};

use super::client::{Events, Qmp, QmpConfig};
use super::error::QmpError;
use super::types::{Disk, MemoryBackend, MigrationInfo, RunState, Version};
use crate::describe::{RamBlock, VmDescription};

/// A QEMU, driven over one QMP connection. Clones share it.
#[derive(Debug, Clone)]
pub struct Qemu {
    qmp: Qmp,
}

/// Migration parameters to set; those left `None` stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    /// How long the guest may stop; QEMU counts in milliseconds.
    pub downtime_limit: Option<Duration>,
    /// How fast QEMU writes at most, in bytes a second.
    pub max_bandwidth: Option<u64>,
    /// How fast the last round will go, in bytes a second (8.2+), instead of QEMU's own guess from its socket.
    pub avail_switchover_bandwidth: Option<u64>,
    /// Who finds zero pages: `legacy` where the destination's RAM is written from outside (9.0+).
    pub zero_page_detection: Option<String>,
    /// Channels beside the main one, with the capability multifd.
    pub multifd_channels: Option<u8>,
    /// What QEMU compresses pages on those channels with.
    pub multifd_compression: Option<String>,
}

/// Pages that QEMU looks at in each GiB to find the dirty rate: as many as every version takes.
const DIRTY_SAMPLE: u32 = 4096;
/// Between two questions whether it has found it.
const DIRTY_LOOK: Duration = Duration::from_millis(100);

impl Qemu {
    /// Connects to the QMP socket at `path`.
    pub async fn connect(path: &Path, config: QmpConfig) -> Result<Self, QmpError> {
        Ok(Qemu { qmp: Qmp::connect(path, config).await? })
    }

    /// The connection, for any other command.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// QEMU's version.
    pub fn version(&self) -> &Version {
        self.qmp.version()
    }

    /// The events from now on.
    pub fn events(&self) -> Events {
        self.qmp.events()
    }

    /// The guest's run state.
    pub async fn run_state(&self) -> Result<RunState, QmpError> {
        let answer = self.query("query-status").await?;
        text(&answer, "status").map(RunState::from).ok_or_else(|| missing("query-status", "status"))
    }

    /// The state of a migration, outgoing or incoming.
    pub async fn migration(&self) -> Result<MigrationInfo, QmpError> {
        Ok(MigrationInfo::parse(&self.query("query-migrate").await?))
    }

    /// Switches migration capabilities on or off. Returns the names that this QEMU does not know; switching one of
    /// those off is no concern, and the caller decides about those to be on.
    pub async fn set_capabilities<'a>(&self, wanted: &[(&'a str, bool)]) -> Result<Vec<&'a str>, QmpError> {
        let answer = self.query("query-migrate-capabilities").await?;
        let list = answer.as_array().ok_or_else(|| missing("query-migrate-capabilities", "the list"))?;
        let known = |name: &str| list.iter().find(|c| c["capability"] == name);
        let mut unknown = Vec::new();
        let mut changes = Vec::new();
        for &(name, state) in wanted {
            match known(name) {
                None => unknown.push(name),
                Some(now) if now["state"] == state => {}
                Some(_) => changes.push(json!({ "capability": name, "state": state })),
            }
        }
        if !changes.is_empty() {
            self.order("migrate-set-capabilities", json!({ "capabilities": changes })).await?;
        }
        Ok(unknown)
    }

    /// Sets migration parameters. Returns the names that this QEMU does not know, which were left out.
    pub async fn set_parameters(&self, wanted: &Parameters) -> Result<Vec<&'static str>, QmpError> {
        let known = self.query("query-migrate-parameters").await?;
        let millis = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let values = [
            ("downtime-limit", wanted.downtime_limit.map(|limit| json!(millis(limit)))),
            ("max-bandwidth", wanted.max_bandwidth.map(Value::from)),
            ("avail-switchover-bandwidth", wanted.avail_switchover_bandwidth.map(Value::from)),
            ("zero-page-detection", wanted.zero_page_detection.clone().map(Value::from)),
            ("multifd-channels", wanted.multifd_channels.map(Value::from)),
            ("multifd-compression", wanted.multifd_compression.clone().map(Value::from)),
        ];
        let mut unknown = Vec::new();
        let mut changes = Map::new();
        for (name, value) in values.into_iter().filter_map(|(name, value)| Some((name, value?))) {
            if known.get(name).is_some() {
                changes.insert(name.into(), value);
            } else {
                unknown.push(name);
            }
        }
        if !changes.is_empty() {
            self.order("migrate-set-parameters", Value::Object(changes)).await?;
        }
        Ok(unknown)
    }

    /// Gives the VMM a descriptor, under a name that a later `fd:NAME` means; a name begins with a letter. One that it has
    /// under this name already is closed.
    pub async fn give(&self, name: &str, descriptor: OwnedFd) -> Result<(), QmpError> {
        self.qmp.execute_with("getfd", json!({ "fdname": name }), descriptor).await.map(|_| ())
    }

    /// Lets the VMM close a descriptor that it was given and has not used.
    pub async fn close(&self, name: &str) -> Result<(), QmpError> {
        self.order("closefd", json!({ "fdname": name })).await
    }

    /// Begins an outgoing migration to `uri`: `unix:PATH`, or `fd:NAME`. It goes on in the background.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate", json!({ "uri": uri })).await
    }

    /// Cancels the outgoing migration. Without one it has no effect.
    pub async fn cancel(&self) -> Result<(), QmpError> {
        self.order("migrate_cancel", Value::Null).await
    }

    /// Lets a destination that waits in `-incoming defer` listen at `uri`, or read from `fd:NAME`.
    pub async fn incoming(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate-incoming", json!({ "uri": uri })).await
    }

    /// Stops the guest. While `inmigrate` it instead keeps the guest from starting by itself.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.order("stop", Value::Null).await
    }

    /// Lets the guest run.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.order("cont", Value::Null).await
    }

    /// Ends the VMM.
    pub async fn quit(&self) -> Result<(), QmpError> {
        self.order("quit", Value::Null).await
    }

    /// Lets the network learn where the guest's addresses are now; QEMU's own defaults for pace and repetition.
    pub async fn announce_self(&self) -> Result<(), QmpError> {
        self.order("announce-self", json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 })).await
    }

    /// The disks that are plugged in.
    pub async fn disks(&self) -> Result<Vec<Disk>, QmpError> {
        let answer = self.query("query-block").await?;
        let list = answer.as_array().ok_or_else(|| missing("query-block", "the list"))?;
        Ok(list.iter().filter_map(disk).collect())
    }

    /// The memory backends.
    pub async fn memory_backends(&self) -> Result<Vec<MemoryBackend>, QmpError> {
        let answer = self.query("query-memdev").await?;
        let list = answer.as_array().ok_or_else(|| missing("query-memdev", "the list"))?;
        let backend = |value: &Value| {
            let flag = |key: &str| value[key].as_bool().unwrap_or_default();
            Some(MemoryBackend {
                id: text(value, "id").map(str::to_owned),
                size: value["size"].as_u64()?,
                share: flag("share"),
                prealloc: flag("prealloc"),
            })
        };
        Ok(list.iter().filter_map(backend).collect())
    }

    /// The machine type under its versioned name, such as `pc-i440fx-7.2`.
    pub async fn machine(&self) -> Result<String, QmpError> {
        let kind = self.qom_text("/machine", "type").await?;
        Ok(kind.strip_suffix("-machine").unwrap_or(&kind).to_owned())
    }

    /// The CPU model's type name, such as `qemu64-x86_64-cpu`, and the number of CPUs.
    pub async fn cpus(&self) -> Result<(String, u32), QmpError> {
        let answer = self.query("query-cpus-fast").await?;
        let cpus = answer.as_array().ok_or_else(|| missing("query-cpus-fast", "the list"))?;
        let path = cpus.first().and_then(|cpu| text(cpu, "qom-path"));
        let path = path.ok_or_else(|| missing("query-cpus-fast", "qom-path"))?;
        let count = u32::try_from(cpus.len()).unwrap_or(u32::MAX);
        Ok((self.qom_text(path, "type").await?, count))
    }

    /// The RAM blocks, from HMP's `info ramblock`; QMP has no command for them.
    pub async fn ram_blocks(&self) -> Result<Vec<RamBlock>, QmpError> {
        let table = self.hmp("info ramblock").await?;
        let blocks = ram_blocks(&table).ok_or_else(|| missing("info ramblock", "a row of the known form"))?;
        if blocks.is_empty() { Err(missing("info ramblock", "any row")) } else { Ok(blocks) }
    }

    /// All that decides whether another VMM can take this one's guest.
    pub async fn describe(&self) -> Result<VmDescription, QmpError> {
        let (cpu, cpus) = self.cpus().await?;
        let name = self.query("query-name").await?;
        let uuid = self.query("query-uuid").await?;
        const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";
        Ok(VmDescription {
            qemu: self.version().clone(),
            machine: self.machine().await?,
            cpu,
            cpus,
            ram: self.ram_blocks().await?,
            name: text(&name, "name").map(str::to_owned),
            uuid: text(&uuid, "UUID").filter(|&uuid| uuid != NO_UUID).map(str::to_owned),
            run_state: self.run_state().await?,
        })
    }

    /// Memory that the guest dirties within so many seconds, bytes, as QEMU (5.2+) finds by hashing a sample of its pages at the beginning
    /// and at the end; takes as long.
    ///
    /// # Errors
    /// This QEMU cannot, or gives no answer within twice the time and a few seconds.
    pub async fn dirtied_within(&self, seconds: u32) -> Result<u64, QmpError> {
        const COMMAND: &str = "query-dirty-rate";
        let arguments = json!({ "calc-time": seconds, "sample-pages": DIRTY_SAMPLE });
        self.qmp.execute("calc-dirty-rate", arguments).await?;
        let looks = (2 * seconds + 3) * 1000 / DIRTY_LOOK.as_millis() as u32;
        for _ in 0..looks {
            tokio::time::sleep(DIRTY_LOOK).await;
            let answer = self.query(COMMAND).await?;
            if answer["status"] == "measured" {
                let rate = answer["dirty-rate"].as_u64().ok_or_else(|| missing(COMMAND, "dirty-rate"))?;
                return Ok(rate.saturating_mul(1 << 20).saturating_mul(seconds.into()));
            }
        }
        Err(missing(COMMAND, "the end of the measurement"))
    }

    /// The answer of a command of the human monitor.
    pub async fn hmp(&self, command: &str) -> Result<String, QmpError> {
        let arguments = json!({ "command-line": command });
        match self.qmp.execute("human-monitor-command", arguments).await? {
            Value::String(answer) => Ok(answer),
            _ => Err(missing("human-monitor-command", "text")),
        }
    }

    async fn query(&self, command: &str) -> Result<Value, QmpError> {
        self.qmp.execute(command, Value::Null).await
    }

    async fn order(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.qmp.execute(command, arguments).await.map(|_| ())
    }

    async fn qom_text(&self, path: &str, property: &str) -> Result<String, QmpError> {
        let answer = self.qmp.execute("qom-get", json!({ "path": path, "property": property })).await?;
        answer.as_str().map(str::to_owned).ok_or_else(|| missing("qom-get", "text"))
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value[key].as_str()
}

fn missing(command: &str, what: &str) -> QmpError {
    QmpError::Unexpected { command: command.into(), what: format!("without {what}") }
}

/// A row of `query-block`; `None` for an empty drive.
fn disk(value: &Value) -> Option<Disk> {
    let inserted = value.get("inserted")?;
    let named = |key: &str| text(value, key).filter(|name| !name.is_empty());
    let device = named("device").or(named("qdev")).unwrap_or("?");
    let file = text(inserted, "file").or(text(&inserted["image"], "filename")).unwrap_or_default();
    Some(Disk {
        device: device.to_owned(),
        file: file.to_owned(),
        read_only: inserted["ro"].as_bool().unwrap_or_default(),
    })
}

/// Parses `info ramblock`. A row is the name, the page size in two words, and hexadecimal numbers: offset, used and
/// total length; 10.0 adds an address and `ro` or `rw`. `None` for a row of another form, or too many.
fn ram_blocks(table: &str) -> Option<Vec<RamBlock>> {
    let mut blocks = Vec::new();
    for row in table.lines() {
        let Some((head, numbers)) = row.split_once(" 0x") else { continue };
        let (head, unit) = head.trim().rsplit_once(' ')?;
        let (name, count) = head.trim_end().rsplit_once(' ')?;
        let unit = match unit {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return None,
        };
        let mut numbers = numbers.split_whitespace().skip(1);
        let mut hex = || u64::from_str_radix(numbers.next()?.strip_prefix("0x")?, 16).ok();
        let name = name.trim();
        if name.is_empty() || name.len() > MAX_BLOCK_NAME || blocks.len() >= MAX_BLOCKS {
            return None;
        }
        blocks.push(RamBlock {
            name: name.to_owned(),
            page_size: count.parse::<u64>().ok()?.checked_mul(unit)?,
            used: hex()?,
            total: hex()?,
        });
    }
    Some(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ram_blocks_of_both_formats_are_understood() {
        let old = "              Block Name    PSize              Offset               Used              Total\r\n\
            \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000001000000 0x0000000001000000\r\n\
            \x20   /rom@etc/acpi/tables    4 KiB  0x0000000001080000 0x0000000000020000 0x0000000000200000\r\n";
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
            \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000001000000 0x0000000001000000 0x00007f2ef5600000  rw\r\n\
            \x20   /rom@etc/acpi/tables    4 KiB  0x0000000001080000 0x0000000000020000 0x0000000000200000 0x00007f2ef4600000  ro\r\n";
        let want = [("pc.ram", 1 << 24, 1 << 24), ("/rom@etc/acpi/tables", 0x20000, 0x200000)]
            .map(|(name, used, total)| RamBlock { name: name.into(), used, total, page_size: 4096 });
        assert_eq!(ram_blocks(old).unwrap(), want);
        assert_eq!(ram_blocks(new).unwrap(), want);
        let huge = " a b    2 MiB  0x0 0x200000 0x200000";
        let block = &ram_blocks(huge).unwrap()[0];
        assert_eq!((block.name.as_str(), block.page_size), ("a b", 2 << 20));
        assert_eq!(ram_blocks(" a 2 XiB 0x0 0x1 0x2"), None);
        assert_eq!(ram_blocks(" a 2 KiB 0x0 0x1 what"), None);
    }

    #[test]
    fn an_empty_drive_is_no_disk() {
        let drive = json!({ "device": "ide1-cd0", "removable": true });
        assert_eq!(disk(&drive), None);
        let block =
            json!({ "device": "", "qdev": "/machine/vda", "inserted": { "ro": false, "file": "/x.img" } });
        let disk = disk(&block).unwrap();
        assert!(disk.device == "/machine/vda" && disk.is_local() && !disk.read_only);
        for (file, local) in [
            ("nbd://h/x", false),
            ("rbd:pool/x", false),
            ("/a:b", true),
            ("json:{\"driver\": \"nbd\"}", false),
            ("host_device:/dev/sda", true),
        ] {
            assert_eq!(Disk { file: file.into(), ..disk.clone() }.is_local(), local, "{file}");
        }
    }
}
